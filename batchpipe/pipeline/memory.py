"""How much memory a stage may take for KV, on its device and on the host, and what to say where it is not enough.

Host memory that a GPU copies from is pinned by CUDA's driver, which RLIMIT_MEMLOCK (`ulimit -l`) does not bind; what
binds is the memory there is, and under WSL2 the part of it that Windows lets be pinned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from batchpipe.errors import MemoryLimitError

# Of what is free once the weights are loaded; the rest is for activations and for the other programs of the machine.
AUTO_SHARE = {"cpu": 0.5, "cuda": 0.9}
# For new KV on its way to the host: one step's is written while another's leaves.
NUM_STAGING_BUFFERS = 2
_GIB = 2**30
_NO_LIMIT_BYTES = 1 << 60  # version 1 writes a number for "none"


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
    container = container_free_bytes()
    return available if container is None else min(available, container)


def container_free_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the container's limit (cgroup version 2 or 1) leaves to all its processes; None where there is no limit.

    Cached files count as used there and give way as memory is asked for, so here they count as free.
    """
    for limit, used, statistics in (
        (cgroup / "memory.max", cgroup / "memory.current", cgroup / "memory.stat"),
        (
            cgroup / "memory" / "memory.limit_in_bytes",
            cgroup / "memory" / "memory.usage_in_bytes",
            cgroup / "memory" / "memory.stat",
        ),
    ):
        text = limit.read_text().strip() if limit.exists() else ""
        if text.isdigit() and int(text) < _NO_LIMIT_BYTES:
            numbers = dict(line.split() for line in statistics.read_text().splitlines())
            cached_bytes = int(numbers["inactive_file"]) + int(numbers["active_file"])
            return max(0, int(text) - int(used.read_text()) + cached_bytes)
    return None


def check_host_memory(kv_host_bytes: int, num_pools: int, free_host_bytes: int) -> None:
    """Raises MemoryLimitError where so many pools of KV do not fit what the host has free for them."""
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
