"""The lengths that a plan reckons with: drawn for every row from its class's curve, as rows done so far have it."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from batchpipe.predict.base import FloatArray, LengthPredictor
from batchpipe.runner.prepare import Prepared
from batchpipe.sample.rng import stream_of
from batchpipe.types import FinishReason, Int32Array, Request
from batchpipe.write.folder import part_names
from batchpipe.write.place import Place, open_place

# Standard errors to the shortest and the longest lengths that are named: nine jobs in ten lie between.
INTERVAL_ERRORS = 1.65
_SEED = 0


class Lengths:
    """Of `requests`, the first rows of the job; what the job has committed of them so far is learnt from."""

    def __init__(self, prepared: Prepared, requests: Sequence[Request]) -> None:
        self._prepared = prepared
        self.requests = list(requests)
        self.eos_token_id = min(prepared.eos_token_ids, default=prepared.info.vocabulary_size)
        self._limits = np.array([request.sampling.max_tokens for request in requests], np.int32)
        # Spread evenly, so that what is drawn has the mean and the shape of the curves.
        self._uniforms = (np.random.default_rng(_SEED).permutation(len(requests)) + 0.5) / max(1, len(requests))
        self._endless = np.array([request.sampling.ignore_eos for request in requests], np.bool_)
        self._done = _done_rows(open_place(prepared.job.output.path))
        self._classes = np.zeros(len(requests), np.int32)
        predictor = prepared.open_predictor()
        if predictor is not None and self.requests:
            self._classes = predictor.classify([request.prompt_token_ids for request in requests])
        taught = self.predictor()
        none = np.zeros(0, np.int32)
        self._curves = None if taught is None else taught.survival(none, none)

    @property
    def scales(self) -> tuple[float, float]:
        """What to stretch the curves by for the shortest and the longest that lengths may reasonably be."""
        if self._curves is None or self._endless.all():
            return 1.0, 1.0
        error = self._curves.sum_error(self._classes[~self._endless], self._limits[~self._endless])
        return exp(-INTERVAL_ERRORS * error), exp(INTERVAL_ERRORS * error)

    @property
    def source(self) -> str:
        if self._curves is None:
            return "sampling.max_tokens"
        name = Path(self._prepared.job.predict.method).name if self._prepared.predictor_is_trained else "general prior"
        return f"{name} and {len(self._done)} rows done" if self._done else name

    def predictor(self) -> LengthPredictor | None:
        """A new one, taught by the rows done so far."""
        predictor = self._prepared.open_predictor()
        if predictor is not None and self._done:
            rows = [i for i, request in enumerate(self.requests) if request.key.index in self._done]
            done = [self._done[self.requests[i].key.index] for i in rows]
            predictor.observe(
                self._classes[rows],
                np.array([tokens for tokens, _ in done], np.int32),
                np.array([ended for _, ended in done], np.bool_),
            )
        return predictor

    def of(self, rows: Sequence[int], scale: float = 1.0) -> Int32Array:
        """A length for each of these rows: the one that as large a share of its class outlives as was drawn for it."""
        limits = self._limits[rows]
        if self._curves is None:
            return limits
        curves = self._curves.stretched(scale)
        grid = curves.grid_tokens.astype(np.float64)
        lengths: FloatArray = np.empty(len(rows))
        for i, row in enumerate(rows):
            lengths[i] = np.interp(self._uniforms[row], curves.alive[self._classes[row], ::-1], grid[::-1])
        # A row that the curve does not see end goes on to its limit.
        unseen = self._endless[rows] | (lengths >= grid[-1])
        return np.where(unseen, limits, np.clip(np.ceil(lengths), 1, limits)).astype(np.int32)

    def by_stream(self, rows: Sequence[int], scale: float = 1.0) -> dict[int, int]:
        """The same for every sample, by the random stream that names it."""
        lengths = self.of(rows, scale).tolist()
        return {
            stream_of(self.requests[row].sampling.seed, self.requests[row].key.row_id, sample): length
            for row, length in zip(rows, lengths, strict=True)
            for sample in range(self.requests[row].sampling.n)
        }


def _done_rows(output: Place) -> dict[int, tuple[int, bool]]:
    """By row index: tokens of a committed completion, and whether it ended by itself."""
    done: dict[int, tuple[int, bool]] = {}
    for name in part_names(output):
        table = pq.read_table(output.open(name), columns=["row_index", "completion_tokens", "finish_reason"])
        for index, tokens, reason in zip(*(column.to_pylist() for column in table.columns), strict=True):
            if reason is not None:
                done[index] = (tokens, reason == FinishReason.STOP)
    return done
