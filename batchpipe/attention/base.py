"""What attention needs to know of a step, and what an attention backend promises.

Shapes: N sequences, T new tokens, B blocks of the widest block table, D head_dim, Hq query and Hkv KV heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from batchpipe.attention.device_inputs import DeviceInputs
from batchpipe.kv.pool import KvPool


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionInputs:
    """One step's sequences, packed one behind the other without padding; the same for every layer of a stage.

    Sequence i's new tokens are rows `query_starts[i]` to `query_starts[i + 1]` of the packed tensors. They stand behind
    `context_lengths[i]` tokens whose KV is already in the blocks of `block_tables[i]`, where theirs goes too. Unused
    places of a block table may hold any block's number. All tensors are on the CPU, rows may have a stride. On a GPU
    `on_device` holds the same, for backends that read nothing else.

    A layer slot is one layer of one block of the pool: block b's are b * num_layers and those behind it. A staged block
    is not in the pool as a whole: its even layers pass through its staging slot, its odd ones through the next.
    """

    query_lengths: Tensor  # [N] int32, each at least 1
    context_lengths: Tensor  # [N] int32
    query_starts: Tensor  # [N + 1] int32
    block_tables: Tensor  # [N, B] int32
    positions: Tensor  # [T] int64: where each new token stands in its sequence
    pool: KvPool
    backend: AttentionBackend
    first_layer: int  # the stage's first layer in the whole model: the pool's layer is layer_idx - first_layer
    staging_slots: Tensor | None = None  # [N, B] int32: layer slots of staged blocks, -1 for others; None: all others
    on_device: DeviceInputs | None = None

    @classmethod
    def of_device(cls, at: DeviceInputs, pool: KvPool, backend: AttentionBackend, first_layer: int) -> AttentionInputs:
        """For a backend that reads `on_device` alone: nothing of the step is on the host."""
        nothing = torch.empty(0, dtype=torch.int32)
        return cls(
            query_lengths=nothing,
            context_lengths=nothing,
            query_starts=nothing,
            block_tables=nothing,
            positions=nothing,
            pool=pool,
            backend=backend,
            first_layer=first_layer,
            on_device=at,
        )

    @property
    def num_tokens(self) -> int:
        return int(self.query_starts[-1])

    @cached_property
    def slots(self) -> tuple[Tensor, Tensor]:
        """([T], [T]) int64 on the pool's device: the block of each new token's KV, and its row in there."""
        return self._places_in(self.block_tables)

    def blocks_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """One layer's KV, a view [n, 2, Hkv, block_tokens, D] of the pool, and tables [N, B] of indices into it."""
        if self.staging_slots is None:
            return self.pool.data[:, layer], self.block_tables
        first_slots, is_staged = self._first_slots
        return self.pool.data.flatten(0, 1), first_slots + torch.where(is_staged, layer % 2, layer).int()

    def slots_of(self, layer: int) -> tuple[Tensor, Tensor]:
        """As `slots`, for the blocks and tables of `blocks_of`."""
        return self.slots if self.staging_slots is None else self._places_in(self.blocks_of(layer)[1])

    @cached_property
    def _first_slots(self) -> tuple[Tensor, Tensor]:
        """int32 and bool [N, B]: of each block the slot of its layer 0, and whether it is staged."""
        assert self.staging_slots is not None
        is_staged = self.staging_slots >= 0
        return torch.where(is_staged, self.staging_slots, self.block_tables * self.pool.num_layers), is_staged

    def _places_in(self, tables: Tensor) -> tuple[Tensor, Tensor]:
        sequences = torch.arange(len(self.query_lengths)).repeat_interleave(self.query_lengths.long())
        blocks = tables[sequences, self.positions // self.pool.block_tokens].long()
        return blocks.to(self.pool.device), (self.positions % self.pool.block_tokens).to(self.pool.device)


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """A layer's scores: `scale * q.k`, then with a softcap `softcap * tanh(score / softcap)`.

    With a window a token attends to itself and the `sliding_window - 1` tokens before it. sinks: [Hq], the scores of
    one more key that has no value.
    """

    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class AttentionBackend(Protocol):
    """Causal attention over paged KV, fastest with blocks of `default_block_tokens`."""

    name: str
    default_block_tokens: int

    def forward(
        self, inputs: AttentionInputs, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """Writes the new tokens' KV to the pool, then lets each attend to its sequence up to itself.

        query [T, Hq, D], key and value [T, Hkv, D], any strides with contiguous D; returns [T, Hq, D],
        contiguous, in query's dtype. `layer` counts from the stage's first.
        """
        ...
