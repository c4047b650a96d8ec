"""A pipeline without a model: exact about blocks, free of arithmetic.

Its "KV" is one number a token, mixed from the token and its position and kept in the blocks the step names. The next
token is a function of all the numbers of the context, read back through the block table: a wrong table, an early free
or two sequences mixed up change the text, as they would with a model.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchpipe.types import Capacity, Int32Array, SamplingParams, Step, StepResult

_MIX = np.uint64(0x9E3779B97F4A7C15)


def fake_kv(token_ids: Int32Array, positions: NDArray[np.integer[Any]]) -> NDArray[np.uint64]:
    places = positions.astype(np.uint64) * np.uint64(0xD1B54A33)
    mixed: NDArray[np.uint64] = (token_ids.astype(np.uint64) + np.uint64(1)) * _MIX + places
    result: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(29))
    return result


class FakePipeline:
    """`eos_every`: about one token in so many is the end token."""

    def __init__(self, capacity: Capacity, vocabulary_size: int, eos_token_id: int, eos_every: int = 8) -> None:
        self.capacity = capacity
        self.device_names = ("none",) * capacity.num_stages
        self._vocabulary_size = vocabulary_size
        self._eos_token_id = eos_token_id
        self._eos_every = eos_every
        self.sockets = ()
        self._in_flight: deque[Step] = deque()
        self._sampling: dict[int, SamplingParams] = {}
        self._kv = np.zeros((capacity.num_blocks, capacity.block_tokens), dtype=np.uint64)

    def __enter__(self) -> FakePipeline:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._in_flight.clear()

    def submit(self, step: Step) -> None:
        assert len(self._in_flight) < self.capacity.max_batches, "more steps in flight than the pipeline holds"
        self._in_flight.append(step)

    def ready(self) -> bool:
        return bool(self._in_flight)

    def restart(self) -> None:
        self._in_flight.clear()
        self._sampling.clear()
        self._kv[:] = 0

    def collect(self) -> StepResult:
        step = self._in_flight.popleft()
        for sequence_id in step.released:
            del self._sampling[sequence_id]
        for start in step.started:
            self._sampling[start.sequence_id] = start.sampling
        assert all(sequence_id in self._sampling for sequence_id in step.sequence_ids), "a step names a stranger"
        self._write(step)
        return StepResult(step.step_id, self._next_tokens(step), {}, (0.0,) * self.capacity.num_stages)

    def _write(self, step: Step) -> None:
        self._kv[step.copied_blocks[:, 1]] = self._kv[step.copied_blocks[:, 0]]
        block_tokens = self.capacity.block_tokens
        rows = np.repeat(np.arange(len(step.sequence_ids)), step.query_lengths)
        firsts = np.cumsum(step.query_lengths) - step.query_lengths
        positions = np.arange(len(step.token_ids)) - firsts[rows] + step.context_lengths[rows]
        blocks = step.block_tables[rows, positions // block_tokens]
        self._kv[blocks, positions % block_tokens] = fake_kv(step.token_ids, positions)

    def _next_tokens(self, step: Step) -> Int32Array:
        tables = step.block_tables[step.samples]
        lengths = (step.context_lengths + step.query_lengths)[step.samples]
        context = self._kv[tables].reshape(len(tables), tables.shape[1] * self.capacity.block_tokens)
        context = np.where(np.arange(context.shape[1]) < lengths[:, None], context, np.uint64(0))
        return self.next_of(context.sum(axis=1, dtype=np.uint64))

    def next_of(self, sums: NDArray[np.uint64]) -> Int32Array:
        """The token that follows a context whose fake KV adds up to `sums`."""
        tokens = (sums >> np.uint64(17)) % np.uint64(self._vocabulary_size)
        ends = (sums >> np.uint64(40)) % np.uint64(self._eos_every) == 0
        return np.where(ends, self._eos_token_id, tokens).astype(np.int32)
