"""Holds what comes back from the host against what went there, and names the sequences that met something else.

A device block that a load filled wrongly stays tainted until another load fills it or a sequence begins it anew.
Where all is looked at, what a step read is held against the host's after it too: KV may be overwritten where it stands.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from batchpipe.kv.checksums import Expected, HostChecks, block_checks, row_weights, token_checks
from batchpipe.kv.pool import KvPool
from batchpipe.types import Int32Array, Step, Transfers

# Of how many host blocks one is looked at, by `engine.kv_verify`.
ONE_IN = {"off": 0, "sample": 32, "all": 1}
# Blocks at a time: looking at them makes a copy.
_READ_BLOCKS = 32


@dataclass(frozen=True, slots=True)
class _Returned:
    """Blocks [N] that came back in a step and are looked at. found: checks [N, R] where they are computed."""

    indices: Int32Array  # among the step's loads, or among its streams
    expected: Expected
    found: Tensor

    def wrong(self) -> list[int]:
        differ = self.expected.differ(self.found.cpu().numpy())
        return [int(index) for index in self.indices[differ]]


class Verifier:
    """One stage's. In a step: `begin`, for every layer `look_at_layer` if anything comes by layer, `stage`,
    `look_at_reads` if it `looks_at_reads`, `corrupt`.
    """

    def __init__(self, stage_index: int, pool: KvPool, num_host_blocks: int, one_in: int) -> None:
        self._stage_index = stage_index
        self._pool = pool
        self._one_in = one_in
        self.looks_at_reads = one_in == 1
        self._weights = row_weights(pool.num_layers, pool.num_kv_heads, pool.device)
        self._on_host = HostChecks(num_host_blocks, pool.block_tokens)
        self._tainted: dict[int, str] = {}  # by device block, what is wrong
        self._overwritten: dict[int, str] = {}  # of the blocks that the step read
        self._loads_by_layer = False
        self._loaded: _Returned | None = None
        self._streamed: _Returned | None = None

    def begin(self, transfers: Transfers, *, loads_by_layer: bool) -> None:
        """Once whole loads are on the device, before anything else is written there or on the host."""
        self._loads_by_layer = loads_by_layer
        self._streamed = None
        if not loads_by_layer:
            self._loaded = self._to_look_at(transfers.loads[:, 0])
            blocks = self._pool.data[self._index(transfers.loads[self._loaded.indices, 1])]
            self._loaded.found.add_(block_checks(blocks, self._weights))

    def look_at_layer(self, layer: int, transfers: Transfers, stream_slots: Int32Array) -> None:
        """Once this layer of all that comes by layer is on the device, before anything is written there.

        stream_slots [V]: the layer slot that its even layers pass through.
        """
        if layer == 0:
            # What blocks must hold is known by now: all that was stored in them before has been.
            self._streamed = self._to_look_at(transfers.streams)
            if self._loads_by_layer:
                self._loaded = self._to_look_at(transfers.loads[:, 0])
        assert self._streamed is not None and self._loaded is not None
        self._add_layer(self._streamed, layer, stream_slots + np.int32(layer % 2))
        if self._loads_by_layer:
            first_slots = transfers.loads[:, 1] * np.int32(self._pool.num_layers)
            self._add_layer(self._loaded, layer, first_slots + np.int32(layer))

    def _add_layer(self, returned: _Returned, layer: int, slots: Int32Array) -> None:
        """slots: of this layer of all blocks, those that are not looked at among them."""
        blocks = self._pool.data.flatten(0, 1)[self._index(slots[returned.indices])]
        returned.found.add_(block_checks(blocks[:, None], self._weights[layer : layer + 1]))

    def look_at_reads(self, step: Step, transfers: Transfers) -> None:
        """Once the step is computed and all that was computed before it is on the host, before anything else moves."""
        num_context = step.context_lengths[:, None] - self._pool.block_tokens * np.arange(step.block_tables.shape[1])
        rows, columns = np.nonzero((num_context > 0) & (step.block_tables < self._pool.num_blocks))
        # Of a block that several sequences read, what the one reads that reads most.
        longest = np.argsort(-num_context[rows, columns], kind="stable")
        rows, columns = rows[longest], columns[longest]
        blocks, firsts = np.unique(step.block_tables[rows, columns], return_index=True)
        rows, columns = rows[firsts], columns[firsts]
        host_blocks = transfers.host_tables[rows, columns]
        copied_from = dict(transfers.host_copies[:, ::-1].tolist())  # the host copies after the step
        holding = np.array([copied_from.get(block, block) for block in host_blocks.tolist()], np.int32)
        self._overwritten.clear()
        for first in range(0, len(blocks), _READ_BLOCKS):
            part = slice(first, first + _READ_BLOCKS)
            expected = self._on_host.look(holding[part])
            expected.known[np.arange(self._pool.block_tokens) >= num_context[rows[part], columns[part], None]] = False
            found = block_checks(self._pool.data[self._index(blocks[part])], self._weights)
            for index in (first + np.flatnonzero(expected.differ(found.cpu().numpy()))).tolist():
                block, host_block = int(blocks[index]), int(host_blocks[index])
                self._overwritten[block] = self._tell(host_block, block, "was overwritten in")

    def stage(self, tokens: Tensor, host_blocks: Int32Array) -> Tensor:
        """Checks of those of a step's new tokens [T, L, 2, H, D] that are looked at, where they are computed."""
        return token_checks(tokens[self._index(self._looked_at(host_blocks))], self._weights)

    def keep(self, host_blocks: Int32Array, rows: Int32Array, checks: Tensor, host_copies: Int32Array) -> None:
        """When a step's copies between host blocks and its new tokens [T] are there; by the thread that stores."""
        self._on_host.copy(host_copies)
        looked_at = self._looked_at(host_blocks)
        self._on_host.put(host_blocks[looked_at], rows[looked_at], checks.cpu().numpy())

    def corrupt(self, step: Step, transfers: Transfers, units: Int32Array) -> dict[int, str]:
        """By sequence id, what was wrong with a block it used. units [V]: the device block of each streamed one."""
        assert self._loaded is not None
        for block in transfers.loads[:, 1].tolist():
            self._tainted.pop(block, None)
        for index in self._loaded.wrong():
            host_block, block = transfers.loads[index].tolist()
            self._tainted[block] = self._tell(host_block, block, "came back changed to")
        for source, target in step.copied_blocks.tolist():
            self._tainted.pop(target, None)
            if source in self._tainted:
                self._tainted[target] = self._tainted[source]
        self._tainted = self._overwritten | self._tainted
        streams = {
            self._pool.num_blocks + v: self._tell(int(transfers.streams[v]), int(units[v]), "came back changed to")
            for v in (self._streamed.wrong() if self._streamed is not None else [])
        }
        return self._met(step, streams) if self._tainted or streams else {}

    def _met(self, step: Step, streams: dict[int, str]) -> dict[int, str]:
        """streams: the wrong ones, by their number in block tables."""
        ends = -(-(step.context_lengths + step.query_lengths) // self._pool.block_tokens)
        firsts = -(-step.context_lengths // self._pool.block_tokens)
        for table, first, end in zip(step.block_tables, firsts, ends, strict=True):
            for block in table[first:end].tolist():  # begun anew in this step
                self._tainted.pop(block, None)
                streams.pop(block, None)
        wrong = self._tainted | streams
        return {
            sequence_id: wrong[block]
            for sequence_id, table, end in zip(step.sequence_ids, step.block_tables, ends, strict=True)
            for block in table[:end].tolist()
            if block in wrong
        }

    def _tell(self, host_block: int, block: int, what: str) -> str:
        return f"stage {self._stage_index}: the KV of host block {host_block} {what} device block {block}"

    def _looked_at(self, host_blocks: Int32Array) -> Int32Array:
        """Indices of those that are."""
        return np.flatnonzero(host_blocks % self._one_in == 0).astype(np.int32)

    def _to_look_at(self, host_blocks: Int32Array) -> _Returned:
        indices = self._looked_at(host_blocks)
        shape = (len(indices), self._pool.block_tokens)
        nothing = torch.zeros(shape, dtype=torch.int64, device=self._pool.device)
        return _Returned(indices, self._on_host.look(host_blocks[indices]), nothing)

    def _index(self, numbers: Int32Array) -> Tensor:
        return torch.from_numpy(numbers).long().to(self._pool.device)
