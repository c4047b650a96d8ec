"""A step's indices on a GPU: packed into one pinned copy, and at the same addresses in every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchpipe.types import BoolArray, Int32Array

# Tokens of KV that one program of a decode reads at most. The edges are fixed, see `triton_kernels`.
CHUNK_TOKENS = 512
# Copies of one step's indices that may be under way while the next step's are filled in.
_NUM_PINNED = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceInputs:
    """One step's indices, int32 on the device; views of one buffer. A padded place does nothing.

    A decode is a sequence with one new token. Its KV is read in items of `CHUNK_TOKENS`, which lie one behind the
    other: sequence i's are first_items[i] to first_items[i + 1]. Other sequences' new tokens are read in tiles.
    Sequence i's block table is `tables[table_starts[i]:]`; see `triton_kernels` for its entries.
    """

    token_ids: Tensor  # [T]; ~k: the k-th token that the step before sampled
    positions: Tensor  # [T]
    token_entries: Tensor  # [T]: entry of the block that takes a new token's KV
    token_rows: Tensor  # [T]: its row in there; -1: padded
    query_starts: Tensor  # [N]
    query_lengths: Tensor  # [N]
    context_lengths: Tensor  # [N]
    first_items: Tensor  # [N + 1]
    table_starts: Tensor  # [N]
    logit_rows: Tensor  # [N]: of the sequences that sample, in front
    item_sequences: Tensor  # [I]; -1: padded
    item_chunks: Tensor  # [I]
    tile_sequences: Tensor  # [P]
    tile_firsts: Tensor  # [P]
    tables: Tensor
    has_long_decodes: bool  # some decode has several items


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """Sizes that a step is padded to, so that it runs as a recorded graph. As many rows as sequences are sampled."""

    num_tokens: int
    num_sequences: int
    num_items: int
    num_tiles: int
    has_long_decodes: bool


_TOKEN_FIELDS = ("token_ids", "positions", "token_entries", "token_rows")
_SEQUENCE_FIELDS = ("query_starts", "query_lengths", "context_lengths", "table_starts", "first_items", "logit_rows")
_ITEM_FIELDS = ("item_sequences", "item_chunks")
_TILE_FIELDS = ("tile_sequences", "tile_firsts")
_PADDED = {"token_rows": -1, "item_sequences": -1, "tile_sequences": -1}


@dataclass(frozen=True, slots=True)
class _Counts:
    tokens: int
    sequences: int
    rows: int
    items: int
    tiles: int

    @classmethod
    def of(cls, padding: Padding) -> _Counts:
        sequences = padding.num_sequences
        return cls(padding.num_tokens, sequences, sequences, padding.num_items, padding.num_tiles)

    def sizes(self) -> dict[str, int]:
        """Of the fields, but for the tables."""
        sizes = dict.fromkeys(_TOKEN_FIELDS, self.tokens) | dict.fromkeys(_SEQUENCE_FIELDS, self.sequences)
        sizes |= dict.fromkeys(_ITEM_FIELDS, self.items) | dict.fromkeys(_TILE_FIELDS, self.tiles)
        return sizes | {"first_items": self.sequences + 1, "logit_rows": self.rows}


class DeviceStepInputs:
    """Fills one device buffer, of a fixed layout, by one copy a step, queued behind what reads the step before.

    block_tokens: of the pool. tile_queries: new tokens of a tile. `generation` changes when the buffer had to grow, and
    with it every address.
    """

    def __init__(
        self, device: torch.device, block_tokens: int, *, max_tokens: int, max_sequences: int, tile_queries: int
    ) -> None:
        self.generation = 0
        self._device = device
        self._block_tokens = block_tokens
        self._tile_queries = tile_queries
        max_tiles = max_tokens // tile_queries + max_sequences
        self._sizes = dict.fromkeys(_TOKEN_FIELDS, max_tokens)
        self._sizes |= dict.fromkeys(_SEQUENCE_FIELDS, max_sequences + 1)
        self._sizes |= dict.fromkeys(_ITEM_FIELDS, 4 * max_sequences) | dict.fromkeys(_TILE_FIELDS, max_tiles)
        self._sizes["tables"] = 64 * max_sequences
        self._make()

    def fill(
        self,
        token_ids: Int32Array,
        query_lengths: Int32Array,
        context_lengths: Int32Array,
        tables: Int32Array,
        samples: BoolArray,
        padding: Padding | None = None,
    ) -> DeviceInputs:
        """tables [N, B]: entries, of which those behind a sequence's last block are not read."""
        lengths = query_lengths + context_lengths
        num_blocks = -(-lengths // self._block_tokens)
        num_items = np.where(query_lengths == 1, -(-lengths // CHUNK_TOKENS), 0)
        used = _Counts(
            len(token_ids), len(lengths), int(samples.sum()), int(num_items.sum()), self._num_tiles(query_lengths)
        )
        shown = used if padding is None else _Counts.of(padding)
        num_entries = int(num_blocks.sum())
        self._hold("tables", num_entries)
        self._hold("item_sequences", shown.items)
        self._hold("tile_sequences", shown.tiles)
        slot = self._turn()
        host = slot.fields
        starts = np.cumsum(query_lengths) - query_lengths
        self._fill_tokens(host, token_ids, starts, query_lengths, context_lengths, tables)
        host["query_starts"][: used.sequences] = starts
        host["query_lengths"][: used.sequences] = query_lengths
        host["context_lengths"][: used.sequences] = context_lengths
        host["table_starts"][: used.sequences] = np.cumsum(num_blocks) - num_blocks
        host["tables"][:num_entries] = tables[np.arange(tables.shape[1]) < num_blocks[:, None]]
        host["logit_rows"][: used.rows] = (starts + query_lengths - 1)[samples]
        _fill_items(host, num_items)
        self._fill_tiles(host, query_lengths, context_lengths)
        if padding is not None:
            _pad(host, used, shown)
        self._copy(slot, num_entries)
        sizes = shown.sizes() | {"tables": self._sizes["tables"]}
        has_long_decodes = bool((num_items > 1).any())
        assert padding is None or has_long_decodes == padding.has_long_decodes
        return DeviceInputs(
            **{name: self._on_device[name][:size] for name, size in sizes.items()}, has_long_decodes=has_long_decodes
        )

    def _fill_tokens(
        self,
        host: dict[str, NDArray[np.int32]],
        token_ids: Int32Array,
        starts: Int32Array,
        query_lengths: Int32Array,
        context_lengths: Int32Array,
        tables: Int32Array,
    ) -> None:
        num_tokens = len(token_ids)
        sequences = np.repeat(np.arange(len(starts)), query_lengths)
        positions = np.arange(num_tokens) + (context_lengths - starts)[sequences]
        host["token_ids"][:num_tokens] = token_ids
        host["positions"][:num_tokens] = positions
        host["token_entries"][:num_tokens] = tables[sequences, positions // self._block_tokens]
        host["token_rows"][:num_tokens] = positions % self._block_tokens

    def _num_tiles(self, query_lengths: Int32Array) -> int:
        return int((-(-query_lengths // self._tile_queries))[query_lengths > 1].sum())

    def _fill_tiles(
        self, host: dict[str, NDArray[np.int32]], query_lengths: Int32Array, context_lengths: Int32Array
    ) -> None:
        """The tiles with the most keys come first, so that the last programs to start are short."""
        longer = np.flatnonzero(query_lengths > 1)
        num_tiles = -(-query_lengths[longer] // self._tile_queries)
        total = int(num_tiles.sum())
        if total:
            sequences = np.repeat(longer, num_tiles)
            firsts = (np.arange(total) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)) * self._tile_queries
            order = np.argsort(-(context_lengths[sequences] + firsts), kind="stable")
            host["tile_sequences"][:total] = sequences[order]
            host["tile_firsts"][:total] = firsts[order]

    # -- buffers ---------------------------------------------------------------------------------------------------

    def _hold(self, name: str, size: int) -> None:
        """Room for so many of a field whose size depends on the sequences' lengths."""
        if size <= self._sizes[name]:
            return
        names = next((names for names in (_ITEM_FIELDS, _TILE_FIELDS) if name in names), (name,))
        self._sizes |= dict.fromkeys(names, 2 * size)
        self.generation += 1
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # nothing reads the old buffers any more
        self._make()

    def _make(self) -> None:
        self._buffer = torch.zeros(sum(self._sizes.values()), dtype=torch.int32, device=self._device)
        self._on_device = _parts(self._buffer, self._sizes)
        self._slots = [_PinnedSlot(self._sizes, self._device) for _ in range(_NUM_PINNED)]
        self._next = 0

    def _turn(self) -> _PinnedSlot:
        slot = self._slots[self._next]
        self._next = (self._next + 1) % _NUM_PINNED
        slot.wait()
        return slot

    def _copy(self, slot: _PinnedSlot, num_entries: int) -> None:
        """The tables stand last, and only their used part travels."""
        size = len(self._buffer) - self._sizes["tables"] + num_entries
        self._buffer[:size].copy_(slot.buffer[:size], non_blocking=True)
        slot.record()


def _fill_items(host: dict[str, NDArray[np.int32]], num_items: NDArray[np.int32]) -> None:
    """The items of each sequence; none of one with several new tokens."""
    firsts = np.cumsum(num_items) - num_items
    total = int(num_items.sum())
    host["first_items"][: len(num_items)] = firsts
    host["first_items"][len(num_items)] = total
    host["item_sequences"][:total] = np.repeat(np.arange(len(num_items)), num_items)
    host["item_chunks"][:total] = np.arange(total) - np.repeat(firsts, num_items)


def _pad(host: dict[str, NDArray[np.int32]], used: _Counts, shown: _Counts) -> None:
    """What is shown behind what is used does nothing: no row of KV, no items, no tiles, the first token's logits."""
    ends = shown.sizes()
    for name, begin in used.sizes().items():
        host[name][begin : ends[name]] = _PADDED.get(name, 0)
    host["first_items"][used.sequences + 1 : shown.sequences + 1] = used.items


class _PinnedSlot:
    """A host's copy of the buffer, free again once the device has it."""

    def __init__(self, sizes: dict[str, int], device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.buffer = torch.zeros(sum(sizes.values()), dtype=torch.int32, pin_memory=on_gpu)
        self.fields = {name: part.numpy() for name, part in _parts(self.buffer, sizes).items()}
        self._device = device
        self._copied: Any = torch.cuda.Event() if on_gpu else None

    def wait(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()

    def record(self) -> None:
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))


def _parts(buffer: Tensor, sizes: dict[str, int]) -> dict[str, Tensor]:
    return dict(zip(sizes, buffer.split(list(sizes.values())), strict=True))
