"""Connects the engine with a predictor: it classifies requests, learns from finished ones, and gives out its curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from batchpipe.predict.base import LengthPredictor
from batchpipe.scheduler.sequence import SequenceState
from batchpipe.scheduler.state import SchedulerState
from batchpipe.types import FinishedRequest, FinishReason, Request

# The curves are estimated anew after this number of completions, or of steps if rows are long.
REFRESH_COMPLETIONS = 32
REFRESH_STEPS = 64


class LengthUpdates:
    """One predictor for all replicas; the curves go to the `states` of their schedulers."""

    def __init__(self, predictor: LengthPredictor, states: Sequence[SchedulerState]) -> None:
        self._predictor = predictor
        self._states = states
        self._finished: list[tuple[int, int, bool]] = []  # class, tokens, whether it ended by itself
        self._refresh()

    def classified(self, requests: Sequence[Request]) -> list[Request]:
        """The requests with their class, and its current mean length as `predicted_tokens`."""
        if not requests:
            return []
        classes = self._predictor.classify([request.prompt_token_ids for request in requests])
        limits = np.array([request.sampling.max_tokens for request in requests], np.int32)
        expected = np.maximum(1, np.round(self._survival.expected_tokens(classes, limits))).astype(int)
        return [
            replace(request, length_class=length_class, predicted_tokens=tokens)
            for request, length_class, tokens in zip(requests, classes.tolist(), expected.tolist(), strict=True)
        ]

    def learn(self, finished: Sequence[FinishedRequest]) -> None:
        """Call after every step: collects completions, and at the intervals above gives all schedulers new curves."""
        for end in finished:
            for completion in end.completions:
                if completion.finish_reason is not None:
                    ended = completion.finish_reason is FinishReason.STOP
                    self._finished.append((end.request.length_class, len(completion.token_ids), ended))
        self._num_steps += 1
        if len(self._finished) >= REFRESH_COMPLETIONS or self._num_steps >= REFRESH_STEPS:
            self._refresh()

    def rows_under_way(self) -> float:
        """The sum over running rows of the fraction of its expected tokens that each has generated."""
        running = self._running()
        if not running:
            return 0.0
        classes, limits, tokens, samples = np.array(
            [(one.length_class, one.max_tokens, len(one.generated), one.group.request.sampling.n) for one in running],
            np.int32,
        ).T
        left = self._survival.expected_left(classes, tokens, limits)
        return float((tokens / (tokens + left) / samples).sum())

    def _running(self) -> list[SequenceState]:
        return [sequence for state in self._states for sequence in state.running.values()]

    def _refresh(self) -> None:
        self._num_steps = 0
        if self._finished:
            classes, tokens, ended = zip(*self._finished, strict=True)
            self._predictor.observe(np.array(classes, np.int32), np.array(tokens, np.int32), np.array(ended, np.bool_))
            self._finished.clear()
        running = self._running()
        self._survival = self._predictor.survival(
            np.array([sequence.group.request.length_class for sequence in running], np.int32),
            np.array([len(sequence.generated) for sequence in running], np.int32),
        )
        for state in self._states:
            state.survival = self._survival
