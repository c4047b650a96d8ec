"""Compares the KV that comes back from the host with what went there, and names the sequences that used wrong KV.

A device block that a load filled wrongly stays tainted until another load fills it or a sequence begins it anew. If
every block is verified, what a step read is compared with the host's after it, too: KV may be overwritten in its place.

"Verified" blocks are every `one_in`-th block of the host. The thread that stores writes the checksums (`keep`), the
computing one reads them: those of a block only after an event behind the block's store, which the load of the block
(`begin`, `check_layer`) or the caller (`check_reads`) waited for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from batchpipe.kv.checksums import Expected, HostChecks, block_checks, row_weights, token_checks
from batchpipe.kv.pool import KvPool
from batchpipe.pipeline.swap.step_transfers import StepTransfers
from batchpipe.types import Int32Array, Step, Transfers

# By `engine.kv_verify`: every how many host blocks one is verified; 0: none is.
ONE_IN = {"off": 0, "sample": 32, "all": 1}
# Reads are checked this many blocks at a time, because that copies them.
_READ_BLOCKS = 32


@dataclass(frozen=True, slots=True)
class _Returned:
    """Verified blocks [N] that came back in a step. found: checksums [N, R] of what came, on the device."""

    indices: Int32Array  # among the step's loads, or among its staged blocks
    expected: Expected
    found: Tensor

    def wrong(self) -> list[int]:
        differ = self.expected.differ(self.found.cpu().numpy())
        return [int(index) for index in self.indices[differ]]


class Verifier:
    """One stage's. Per step: `begin`, `check_layer` for every layer if anything comes by layer, `stage`, `check_reads`
    if it `checks_reads`, `corrupt`; and `keep` by the thread that stores.
    """

    def __init__(self, stage_index: int, pool: KvPool, num_host_blocks: int, one_in: int) -> None:
        self._stage_index = stage_index
        self._pool = pool
        self._one_in = one_in
        self.checks_reads = one_in == 1
        self._weights = row_weights(pool.num_layers, pool.num_kv_heads, pool.device)
        self._on_host = HostChecks(num_host_blocks, pool.block_tokens)
        self._tainted: dict[int, str] = {}  # device block -> what is wrong with it
        self._overwritten: dict[int, str] = {}  # the same, of the blocks that the last step read
        self._loaded: _Returned | None = None
        self._staged: _Returned | None = None

    def begin(self, transfers: Transfers, *, loads_by_layer: bool) -> None:
        """Call once whole loads are on the device, before anything else is written there or on the host."""
        self._staged = None
        if not loads_by_layer:
            self._loaded = self._returned(transfers.loads[:, 0])
            blocks = self._pool.data[self._index(transfers.loads[self._loaded.indices, 1])]
            self._loaded.found.add_(block_checks(blocks, self._weights))

    def check_layer(self, layer: int, moves: StepTransfers) -> None:
        """Call once this layer of all that comes by layer is on the device, before anything is written there."""
        transfers = moves.transfers
        if layer == 0:
            # All that earlier steps stored in these blocks has been stored, so their checksums are known.
            self._staged = self._returned(transfers.staged_blocks)
            if moves.loads_by_layer:
                self._loaded = self._returned(transfers.loads[:, 0])
        assert self._staged is not None and self._loaded is not None
        self._add_layer(self._staged, layer, moves.staging_slots + np.int32(layer % 2))
        if moves.loads_by_layer:
            self._add_layer(self._loaded, layer, transfers.loads[:, 1] * np.int32(self._pool.num_layers) + layer)

    def _add_layer(self, returned: _Returned, layer: int, slots: Int32Array) -> None:
        """slots: this layer of all blocks that came, those that are not verified included."""
        blocks = self._pool.data.flatten(0, 1)[self._index(slots[returned.indices])]
        returned.found.add_(block_checks(blocks[:, None], self._weights[layer : layer + 1]))

    def check_reads(self, step: Step, transfers: Transfers) -> None:
        """Call once the step is computed and the steps before it are on the host, before anything else moves."""
        num_context = step.context_lengths[:, None] - self._pool.block_tokens * np.arange(step.block_tables.shape[1])
        rows, columns = np.nonzero((num_context > 0) & (transfers.staging_tables < 0))
        # Of a block that several sequences read, the longest part that one of them read is compared.
        longest = np.argsort(-num_context[rows, columns], kind="stable")
        rows, columns = rows[longest], columns[longest]
        blocks, firsts = np.unique(step.block_tables[rows, columns], return_index=True)
        rows, columns = rows[firsts], columns[firsts]
        host_blocks = transfers.host_tables[rows, columns]
        copied_from = dict(transfers.host_copies[:, ::-1].tolist())  # the host copies only after the step
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
        """Checksums, on the device, of the verified ones of a step's new tokens [T, L, 2, H, D]."""
        return token_checks(tokens[self._index(self._verified(host_blocks))], self._weights)

    def keep(self, host_blocks: Int32Array, rows: Int32Array, checks: Tensor, host_copies: Int32Array) -> None:
        """Call once a step's copies between host blocks and its new tokens [T] are on the host."""
        self._on_host.copy(host_copies)
        verified = self._verified(host_blocks)
        self._on_host.put(host_blocks[verified], rows[verified], checks.cpu().numpy())

    def corrupt(self, moves: StepTransfers) -> dict[int, str]:
        """What was wrong with the KV that the step used, by sequence id."""
        assert self._loaded is not None
        loads, staged_blocks = moves.transfers.loads, moves.transfers.staged_blocks
        for block in loads[:, 1].tolist():
            self._tainted.pop(block, None)
        for index in self._loaded.wrong():
            host_block, block = loads[index].tolist()
            self._tainted[block] = self._tell(host_block, block, "came back changed to")
        for source, target in moves.step.copied_blocks.tolist():
            self._tainted.pop(target, None)
            if source in self._tainted:
                self._tainted[target] = self._tainted[source]
        self._tainted = self._overwritten | self._tainted
        staged = {
            slot: self._tell(int(staged_blocks[slot]), int(moves.staging_blocks[slot]), "came back changed to")
            for slot in (self._staged.wrong() if self._staged is not None else [])
        }
        return self._met(moves, staged) if self._tainted or staged else {}

    def _met(self, moves: StepTransfers, staged: dict[int, str]) -> dict[int, str]:
        """staged: what is wrong, by staging slot."""
        step = moves.step
        tables, slot_tables = step.block_tables.tolist(), moves.transfers.staging_tables.tolist()
        ends = -(-(step.context_lengths + step.query_lengths) // self._pool.block_tokens)
        firsts = -(-step.context_lengths // self._pool.block_tokens)
        for table, slots, first, end in zip(tables, slot_tables, firsts, ends, strict=True):
            for block, slot in zip(table[first:end], slots[first:end], strict=True):  # begun anew in this step
                if slot < 0:
                    self._tainted.pop(block, None)
                else:
                    staged.pop(slot, None)
        met = {}
        for sequence_id, table, slots, end in zip(step.sequence_ids, tables, slot_tables, ends, strict=True):
            for block, slot in zip(table[:end], slots[:end], strict=True):
                wrong = self._tainted.get(block) if slot < 0 else staged.get(slot)
                if wrong is not None:
                    met[sequence_id] = wrong
        return met

    def _tell(self, host_block: int, block: int, what: str) -> str:
        return f"stage {self._stage_index}: the KV of host block {host_block} {what} device block {block}"

    def _verified(self, host_blocks: Int32Array) -> Int32Array:
        """Indices of the verified ones."""
        return np.flatnonzero(host_blocks % self._one_in == 0).astype(np.int32)

    def _returned(self, host_blocks: Int32Array) -> _Returned:
        indices = self._verified(host_blocks)
        shape = (len(indices), self._pool.block_tokens)
        nothing = torch.zeros(shape, dtype=torch.int64, device=self._pool.device)
        return _Returned(indices, self._on_host.look(host_blocks[indices]), nothing)

    def _index(self, numbers: Int32Array) -> Tensor:
        return torch.from_numpy(numbers).long().to(self._pool.device)
