"""A cost model that learns from the run it serves: what steps really took corrects what was expected of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from batchpipe.cost.model import CostModel, KvLink, StepWork, seconds_without_stalls
from batchpipe.types import LinkUse

WINDOW_STEPS = 128
REFIT_STEPS = 8
# The factor on the prior is free to move; the other terms must be worth a few steps' evidence each.
_STIFFNESS = np.array([0.01, 1.0, 1.0, 1.0, 1.0])
_START = np.array([1.0, 0.0, 0.0, 0.0, 0.0])
_HUBER = 1.5 * 1.4826  # in medians of absolute deviations: beyond it a step counts less
_NUM_PASSES = 3
# A line goes wrong far from its points: no step is predicted below this share of the prior times the smallest factor on
# the prior that was measured.
_FLOOR = 0.25


class OnlineCost:
    """A `CostModel` over another one, the prior: a profile, a fit, a roofline of a device like this one.

    Per stage, and apart for steps with and without prompts, seconds = a * prior + b * tokens + c * decodes' context
    tokens + d * prompts' pairs + e over the last WINDOW_STEPS steps, least squares of the relative error with Huber's
    weights, drawn to a = 1 and the rest 0. So a few steps correct the scale, many the shape, and the prior's tile
    edges stay.
    """

    def __init__(self, prior: CostModel) -> None:
        self._prior = prior
        self._decodes = [_Window() for _ in range(prior.num_stages)]
        self._prompts = [_Window() for _ in range(prior.num_stages)]

    @property
    def num_stages(self) -> int:
        return self._prior.num_stages

    @property
    def control_seconds(self) -> float:
        return self._prior.control_seconds

    @property
    def kv_links(self) -> Sequence[KvLink]:
        """As the prior has them; what they turn out to carry is learned by `PrefetchBudget`, which alone asks."""
        return self._prior.kv_links

    @property
    def distinct_stages(self) -> Sequence[int]:
        """Each stage has measurements of its own."""
        return range(self.num_stages)

    def stage_seconds(self, stage: int, work: StepWork) -> float:
        return self._window(stage, work).predict(self._features(stage, work))

    def handoff_seconds(self, num_tokens: int) -> float:
        return self._prior.handoff_seconds(num_tokens)

    def observe(self, work: StepWork, stage_seconds: Sequence[float], link_uses: Sequence[LinkUse] = ()) -> None:
        """Takes in what each stage needed for a step, as `StepResult` has it; tens of microseconds a stage."""
        assert len(stage_seconds) == self.num_stages, "a time for every stage"
        for stage, seconds in enumerate(seconds_without_stalls(stage_seconds, link_uses)):
            if seconds > 0:  # a clock too coarse for the step says nothing
                self._window(stage, work).add(self._features(stage, work), seconds)

    def median_error(self) -> float | None:
        """|predicted / measured - 1| of recent steps, predicted before they ran; None before the first step."""
        errors = [window.recent_errors() for window in (*self._decodes, *self._prompts)]
        known = np.concatenate(errors)
        return float(np.median(known)) if len(known) else None

    def _window(self, stage: int, work: StepWork) -> _Window:
        return (self._prompts if work.prefill_pairs else self._decodes)[stage]

    def _features(self, stage: int, work: StepWork) -> NDArray[np.float64]:
        prior = self._prior.stage_seconds(stage, work)
        return np.array([prior, work.num_tokens, work.decode_context_tokens, work.prefill_pairs, 1.0])


class _Window:
    """The last steps of one kind on one stage, and the coefficients they give."""

    def __init__(self) -> None:
        self._rows = np.zeros((WINDOW_STEPS, len(_START)))  # features / seconds, so that the target is 1
        self._errors = np.zeros(WINDOW_STEPS)
        self._num_steps = 0
        self._coefficients = _START
        self._least_factor = 1.0

    def predict(self, features: NDArray[np.float64]) -> float:
        return max(float(features @ self._coefficients), _FLOOR * self._least_factor * float(features[0]))

    def add(self, features: NDArray[np.float64], seconds: float) -> None:
        place = self._num_steps % WINDOW_STEPS
        self._errors[place] = abs(self.predict(features) / seconds - 1.0)
        self._rows[place] = features / seconds
        self._num_steps += 1
        # The first steps each matter; later ones only together.
        if self._num_steps <= REFIT_STEPS or self._num_steps % REFIT_STEPS == 0:
            self._refit()

    def recent_errors(self) -> NDArray[np.float64]:
        return self._errors[: min(self._num_steps, WINDOW_STEPS)]

    def _refit(self) -> None:
        rows = self._rows[: min(self._num_steps, WINDOW_STEPS)]
        # Columns of one size, so that stiffness means the same for each; a column of zeros stays where it is.
        scale = np.sqrt(np.mean(rows**2, axis=0))
        scale[scale == 0] = 1.0
        scaled = rows / scale
        start = _START * scale
        residual = 1.0 - scaled @ start
        solution = start
        # A prior that is wrong by a factor is no outlier: the first pass measures deviations from the median.
        deviations = np.abs(residual - np.median(residual))
        for _ in range(_NUM_PASSES):
            limit = _HUBER * np.median(deviations)
            weights = np.minimum(1.0, limit / np.maximum(deviations, 1e-12)) if limit > 0 else np.ones(len(rows))
            weighted = scaled * weights[:, None]
            normal = scaled.T @ weighted + np.diag(_STIFFNESS)
            solution = start + np.linalg.solve(normal, weighted.T @ residual)
            deviations = np.abs(1.0 - scaled @ solution)
        self._coefficients = solution / scale
        self._least_factor = 1.0 / float(rows[:, 0].max())
