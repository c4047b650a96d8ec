"""Holds what comes back from the host against what went there, and names the sequences that met something else.

A device block that a load filled wrongly stays tainted until another load fills it or a sequence begins it anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from batchpipe.kv.checks import Expected, HostChecks, block_checks, row_weights, token_checks
from batchpipe.kv.pool import KvPool
from batchpipe.types import Int32Array, Step, Transfers

# Of how many host blocks one is looked at, by `engine.kv_verify`.
ONE_IN = {"off": 0, "sample": 32, "all": 1}


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
    """One stage's. In a step: `look_at_loads`, for every layer `look_at_streams` if it has any, `stage`, `corrupt`."""

    def __init__(self, stage_index: int, pool: KvPool, num_host_blocks: int, one_in: int) -> None:
        self._stage_index = stage_index
        self._pool = pool
        self._one_in = one_in
        self._weights = row_weights(pool.num_layers, pool.num_kv_heads, pool.device)
        self._on_host = HostChecks(num_host_blocks, pool.block_tokens)
        self._tainted: dict[int, str] = {}  # by device block, what is wrong
        self._loaded: _Returned | None = None
        self._streamed: _Returned | None = None

    def look_at_loads(self, transfers: Transfers) -> None:
        """Once the loads of a step are on the device, before anything else is written there or on the host."""
        indices, expected = self._look(transfers.loads[:, 0])
        blocks = self._pool.data[self._index(transfers.loads[indices, 1])]
        self._loaded = _Returned(indices, expected, block_checks(blocks, self._weights))
        self._streamed = None

    def look_at_streams(self, layer: int, streams: Int32Array, slots: Int32Array) -> None:
        """Once layer `layer` of all streamed host blocks [V] is in slots [V], before anything is written there."""
        if layer == 0:
            # What they must hold is known by now: all that was stored in them before has been.
            indices, expected = self._look(streams)
            nothing = torch.zeros((len(indices), self._pool.block_tokens), dtype=torch.int64, device=self._pool.device)
            self._streamed = _Returned(indices, expected, nothing)
        assert self._streamed is not None
        blocks = self._pool.data.flatten(0, 1)[self._index(slots[self._streamed.indices])]
        self._streamed.found.add_(block_checks(blocks[:, None], self._weights[layer : layer + 1]))

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
            self._tainted[block] = self._tell(host_block, block)
        for source, target in step.copied_blocks.tolist():
            self._tainted.pop(target, None)
            if source in self._tainted:
                self._tainted[target] = self._tainted[source]
        streams = {
            self._pool.num_blocks + v: self._tell(int(transfers.streams[v]), int(units[v]))
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

    def _tell(self, host_block: int, block: int) -> str:
        came_back = f"host block {host_block} came back to device block {block}"
        return f"stage {self._stage_index}: {came_back} with another content"

    def _looked_at(self, host_blocks: Int32Array) -> Int32Array:
        """Indices of those that are."""
        return np.flatnonzero(host_blocks % self._one_in == 0).astype(np.int32)

    def _look(self, host_blocks: Int32Array) -> tuple[Int32Array, Expected]:
        indices = self._looked_at(host_blocks)
        return indices, self._on_host.look(host_blocks[indices])

    def _index(self, numbers: Int32Array) -> Tensor:
        return torch.from_numpy(numbers).long().to(self._pool.device)
