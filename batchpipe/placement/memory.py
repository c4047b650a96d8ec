"""How much memory a stage may take for KV, on its device and on the host, and what to say where it is not enough.

Host memory that a GPU copies from is pinned by CUDA's driver, which RLIMIT_MEMLOCK (`ulimit -l`) does not bind; what
binds is the memory there is, and under WSL2 the part of it that Windows lets be pinned.
"""

from __future__ import annotations

from collections.abc import Sequence

from batchpipe.errors import MemoryLimitError
from batchpipe.kv.layout import KvLayout
from batchpipe.model.describe import ModelInfo
from batchpipe.pipeline.memory import StageMemory
from batchpipe.placement.machine import Machine
from batchpipe.placement.stage_split import StageSplit, stage_weight_bytes

# Of what is free once the weights are loaded; the rest is for activations and for the other programs of the machine.
AUTO_SHARE = {"cpu": 0.5, "cuda": 0.95}
_GIB = 2**30


def memory_beside_weights(
    machine: Machine, split: StageSplit, info: ModelInfo, block_tokens: int
) -> tuple[StageMemory, ...]:
    """What each stage will have free once its weights are loaded; on the CPU all stages share one memory.

    Raises MemoryLimitError where weights do not fit.
    """
    weight_bytes = stage_weight_bytes(info, split.layers)
    if split.device == "cpu":
        free = [machine.free_bytes - split.num_replicas * sum(weight_bytes)] * split.num_stages
    else:
        free = [machine.free_bytes - num_bytes for num_bytes in weight_bytes]
    if min(free) <= 0:
        raise MemoryLimitError(
            f"engine.num_stages: {split.num_stages} stages of {machine.name} hold up to {gib(max(weight_bytes))} "
            f"of weights each and {gib(machine.free_bytes)} are free; ask for more stages"
        )
    kv = KvLayout.of(info, block_tokens)
    return tuple(
        StageMemory(free_bytes, kv.block_bytes(len(own)), block_tokens)
        for free_bytes, own in zip(free, split.layers, strict=True)
    )


def check_host_memory(kv_host_bytes: int, num_pools: int, free_host_bytes: int) -> None:
    """Raises MemoryLimitError where `num_pools` pools of KV do not fit what the host has free for them."""
    asked_bytes, free_host_bytes = num_pools * kv_host_bytes, max(0, free_host_bytes)
    if asked_bytes > free_host_bytes:
        raise MemoryLimitError(
            f"engine.kv_host_memory asks for {gib(kv_host_bytes)} of host memory per stage, {gib(asked_bytes)} for "
            f"{num_pools} of them, and {gib(free_host_bytes)} are free for it: {gib(asked_bytes - free_host_bytes)} "
            f"are missing; lower engine.kv_host_memory to {free_host_bytes // num_pools >> 20}MiB or less"
        )


def gib(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"


def num_kv_blocks(
    stages: Sequence[StageMemory],
    requested_bytes: int | None,
    device: str,
    most_blocks: int,
    num_sharers: int,
) -> int:
    """Blocks for every stage (the same number on each): what was asked for, or what is free but no more than useful.

    requested_bytes: engine.kv_device_memory of one stage, None for `auto`.
    most_blocks: of the largest possible set of running sequences.
    num_sharers: stages, those of other replicas included, that take their KV from the same memory.
    Raises MemoryLimitError where not even one block fits, or where more is asked for than is there.
    """
    block_tokens = stages[0].block_tokens
    room_bytes = [stage.free_bytes // num_sharers for stage in stages]
    if requested_bytes is None:
        share = AUTO_SHARE[device.split(":")[0]]
        num_blocks = min(
            int(room * share) // stage.bytes_per_block for stage, room in zip(stages, room_bytes, strict=True)
        )
        num_blocks = min(num_blocks, most_blocks)
    else:
        for room in room_bytes:
            if requested_bytes > room:
                raise MemoryLimitError(
                    f"engine.kv_device_memory asks for {gib(requested_bytes)} of KV per stage and {gib(room)} are "
                    f"free: {gib(requested_bytes - room)} are missing; lower engine.kv_device_memory"
                )
        num_blocks = min(requested_bytes // stage.bytes_per_block for stage in stages)
    if num_blocks < 1:
        largest = max(stage.bytes_per_block for stage in stages)
        offered = min(room_bytes) if requested_bytes is None else requested_bytes
        raise MemoryLimitError(
            f"one KV block of {block_tokens} tokens takes {largest / 2**20:.2f} MiB and there is room for "
            f"{offered / 2**20:.2f} MiB; raise engine.kv_device_memory or lower engine.block_tokens"
        )
    return num_blocks
