"""How much memory a stage may take for KV, and what to say where it is not enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from batchpipe.errors import MemoryLimitError

# Of what is free once the weights are loaded; the rest is for activations and for the other programs of the machine.
AUTO_SHARE = {"cpu": 0.5, "cuda": 0.9}
_GIB = 2**30


@dataclass(frozen=True)
class StageMemory:
    """What a loaded stage reports. `free_bytes` is what its device still has."""

    free_bytes: int
    bytes_per_block: int
    block_tokens: int


def free_bytes(device: str) -> int:
    """What the device has left: on the CPU what the system and the container's limit leave."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    available = int(psutil.virtual_memory().available)
    limit = container_limit_bytes()
    return available if limit is None else min(available, limit - psutil.Process().memory_info().rss)


def container_limit_bytes() -> int | None:
    """The cgroup's memory limit, version 2 or 1; None where there is none."""
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(name)
        if path.exists():
            text = path.read_text().strip()
            if text.isdigit() and int(text) < 1 << 60:
                return int(text)
    return None


def num_kv_blocks(
    stages: Sequence[StageMemory],
    requested_bytes: int | None,
    device: str,
    num_useful_tokens: int,
    num_sharers: int,
) -> int:
    """Blocks for every stage (the same number on each): what was asked for, or what is free but no more than useful.

    requested_bytes: engine.kv_device_memory of one stage, None for `auto`.
    num_useful_tokens: KV that the largest possible set of running sequences can hold.
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
        num_blocks = min(num_blocks, -(-num_useful_tokens // block_tokens))
    else:
        for room in room_bytes:
            if requested_bytes > room:
                raise MemoryLimitError(
                    f"engine.kv_device_memory asks for {requested_bytes / _GIB:.2f} GiB of KV per stage and "
                    f"{room / _GIB:.2f} GiB are free: {(requested_bytes - room) / _GIB:.2f} GiB are missing; "
                    "lower engine.kv_device_memory"
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
