"""How KV lies in memory, in numbers: the one source of every size of KV. Torch-free.

Each pool of a stage: [num_blocks, num_layers, num_planes, num_kv_heads, block_tokens, head_dim]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# While KV is swapped in layer by layer, a device block of the staging area holds this many layers of each block that
# passes through it: attention reads one of them while the next one arrives.
STAGED_LAYERS = 2


class _Model(Protocol):
    """What the KV of a model depends on."""

    @property
    def dtype(self) -> str: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The KV of one block in one layer. num_planes: keys and values."""

    num_kv_heads: int
    head_dim: int
    item_bytes: int
    block_tokens: int
    num_planes: int = 2

    @classmethod
    def of(cls, model: _Model, block_tokens: int = 1) -> KvLayout:
        return cls(model.num_kv_heads, model.head_dim, ITEM_BYTES[model.dtype], block_tokens)

    @property
    def bytes_per_token_layer(self) -> int:
        return self.num_planes * self.num_kv_heads * self.head_dim * self.item_bytes

    def block_bytes(self, num_layers: int) -> int:
        return num_layers * self.block_tokens * self.bytes_per_token_layer

    def pool_shape(self, num_blocks: int, num_layers: int) -> tuple[int, ...]:
        return (num_blocks, num_layers, self.num_planes, self.num_kv_heads, self.block_tokens, self.head_dim)


def streams_per_block(num_layers: int) -> int:
    """How many blocks of a stage's KV pass through one device block at a time, layer by layer."""
    return num_layers // STAGED_LAYERS


def saves_room(streams_per_block: int) -> bool:
    """Whether swapping layer by layer takes less of the device than swapping whole blocks: from four layers on."""
    return streams_per_block > 1
