"""How one stage's KV lies in memory, in numbers. Torch-free."""

from __future__ import annotations

# While KV is swapped in layer by layer, a device block of the staging area holds this many layers of each block that
# passes through it: attention reads one of them while the next one arrives.
STAGED_LAYERS = 2


def streams_per_block(num_layers: int) -> int:
    """How many blocks of a stage's KV pass through one device block at a time, layer by layer."""
    return num_layers // STAGED_LAYERS


def saves_room(streams_per_block: int) -> bool:
    """Whether swapping layer by layer takes less of the device than swapping whole blocks: from four layers on."""
    return streams_per_block > 1
