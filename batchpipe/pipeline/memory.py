"""The memory that a device and the host have left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# For new KV on its way to the host: one step's is written while another's leaves.
NUM_STAGING_BUFFERS = 2
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
