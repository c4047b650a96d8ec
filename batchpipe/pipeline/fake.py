"""A pipeline without a model that keeps blocks exactly, for tests of the scheduler and of whole jobs.

Its "KV" is one number per token, mixed from the token and its position and kept in the blocks that the step names. The
next token is a function of all the numbers of the context, read back through the block table. So a wrong table, a block
freed too early or two sequences mixed up change the text, as they would with a model. With two tiers it moves KV as
early as a stage may: the loads of the next step are copied before a step is computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchpipe.types import Capacity, Int32Array, LinkUse, Step, StepResult, Transfers

_MIX = np.uint64(0x9E3779B97F4A7C15)


def fake_kv(token_ids: Int32Array, positions: NDArray[np.integer[Any]]) -> NDArray[np.uint64]:
    places = positions.astype(np.uint64) * np.uint64(0xD1B54A33)
    mixed: NDArray[np.uint64] = (token_ids.astype(np.uint64) + np.uint64(1)) * _MIX + places
    result: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(29))
    return result


class FakePipeline:
    """See `Pipeline`. About one token in `eos_every` is the end token."""

    def __init__(self, capacity: Capacity, vocabulary_size: int, eos_token_id: int, eos_every: int = 8) -> None:
        self.capacity = capacity
        self.device_names = ("none",) * capacity.num_stages
        self._vocabulary_size = vocabulary_size
        self._eos_token_id = eos_token_id
        self._eos_every = eos_every
        self._in_flight: deque[Step] = deque()
        self._started: set[int] = set()
        self._sampled = np.zeros(0, np.int32)  # by the step before
        self._kv = np.zeros((capacity.num_blocks, capacity.block_tokens), dtype=np.uint64)
        self._host_kv = np.zeros((capacity.num_host_blocks, capacity.block_tokens), dtype=np.uint64)

    def __enter__(self) -> FakePipeline:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._in_flight.clear()

    def submit(self, step: Step) -> None:
        assert len(self._in_flight) < self.capacity.max_in_flight, "more steps in flight than the pipeline holds"
        self._in_flight.append(step)

    def ready(self) -> bool:
        return bool(self._in_flight)

    def wait(self, timeout_seconds: float, others: Sequence[FakePipeline] = ()) -> bool:
        return True

    def restart(self) -> None:
        self._in_flight.clear()
        self._started.clear()
        self._kv[:] = 0
        self._host_kv[:] = 0

    def collect(self) -> StepResult:
        step = self._with_known_tokens(self._in_flight.popleft())
        assert self._started.issuperset(step.released), "an unknown sequence is released"
        self._started.difference_update(step.released)
        self._started.update(start.sequence_id for start in step.started)
        assert self._started.issuperset(step.sequence_ids), "an unknown sequence in a step"
        if step.transfers is not None:
            self._load(step.transfers)
        if self._in_flight and (following := self._in_flight[0].transfers) is not None:
            self._load_early(step, following)
        self._write(step)
        uses = (LinkUse(),) * self.capacity.num_stages if step.transfers is not None else ()
        seconds = (0.0,) * self.capacity.num_stages
        self._sampled = self._next_tokens(step)
        return StepResult(step.step_id, self._sampled, {}, seconds, link_uses=uses)

    def _with_known_tokens(self, step: Step) -> Step:
        is_known = step.token_ids >= 0
        if is_known.all():
            return step
        assert self.capacity.runs_ahead and self._sampled.min() >= 0, "a token that no step sampled"
        sampled = self._sampled[np.where(is_known, 0, ~step.token_ids)]
        return replace(step, token_ids=np.where(is_known, step.token_ids, sampled))

    def _load(self, transfers: Transfers) -> None:
        self._kv[transfers.loads[:, 1]] = self._host_kv[transfers.loads[:, 0]]

    def _load_early(self, step: Step, following: Transfers) -> None:
        """What the following step loads, but for the blocks that this step writes on the host first."""
        assert step.transfers is not None
        written = self._new_rows(step, step.transfers.host_tables)[0]
        early = ~np.isin(following.loads[:, 0], written)
        self._kv[following.loads[early, 1]] = self._host_kv[following.loads[early, 0]]
        self._kv[following.staging_blocks] = _MIX  # layers of other blocks pass through

    def _write(self, step: Step) -> None:
        self._kv[step.copied_blocks[:, 1]] = self._kv[step.copied_blocks[:, 0]]
        blocks, rows, positions = self._new_rows(step, step.block_tables)
        values = fake_kv(step.token_ids, positions)
        if step.transfers is None:
            self._kv[blocks, rows] = values
        else:
            is_whole = self._new_rows(step, step.transfers.staging_tables)[0] < 0
            self._kv[blocks[is_whole], rows[is_whole]] = values[is_whole]
            copies = step.transfers.host_copies
            self._host_kv[copies[:, 1]] = self._host_kv[copies[:, 0]]
            host_blocks, rows, _ = self._new_rows(step, step.transfers.host_tables)
            self._host_kv[host_blocks, rows] = values
            self._kv[step.transfers.staging_blocks] = _MIX

    def _new_rows(self, step: Step, tables: Int32Array) -> tuple[Int32Array, Int32Array, NDArray[np.integer[Any]]]:
        """Of each of the step's new tokens: its block by these tables, its row in the block, its position."""
        block_tokens = self.capacity.block_tokens
        sequences = np.repeat(np.arange(len(step.sequence_ids)), step.query_lengths)
        firsts = np.cumsum(step.query_lengths) - step.query_lengths
        positions = np.arange(len(step.token_ids)) - firsts[sequences] + step.context_lengths[sequences]
        return tables[sequences, positions // block_tokens], positions % block_tokens, positions

    def _next_tokens(self, step: Step) -> Int32Array:
        lengths = (step.context_lengths + step.query_lengths)[step.samples]
        context = self._kv[step.block_tables[step.samples]]
        if step.transfers is not None and len(step.transfers.staged_blocks):
            staged_blocks, num_staging = step.transfers.staged_blocks, len(step.transfers.staging_blocks)
            assert len(staged_blocks) <= num_staging * self.capacity.streams_per_block
            slots = step.transfers.staging_tables[step.samples]
            context = np.where(slots[:, :, None] < 0, context, self._host_kv[staged_blocks[slots]])
        context = context.reshape(len(context), context.shape[1] * self.capacity.block_tokens)
        context = np.where(np.arange(context.shape[1]) < lengths[:, None], context, np.uint64(0))
        return self.next_of(context.sum(axis=1, dtype=np.uint64))

    def next_of(self, sums: NDArray[np.uint64]) -> Int32Array:
        """The token that follows a context whose fake KV adds up to `sums`."""
        tokens = (sums >> np.uint64(17)) % np.uint64(self._vocabulary_size)
        ends = (sums >> np.uint64(40)) % np.uint64(self._eos_every) == 0
        return np.where(ends, self._eos_token_id, tokens).astype(np.int32)
