"""The meter: what the run loop saw, summed into the metrics that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from batchpipe.cost.model import seconds_without_stalls
from batchpipe.types import Outcome, StepResult


class Measured(TypedDict):
    """The metrics that a meter gives, named as in `RunMetrics`."""

    prompt_tokens: int
    completion_tokens: int
    output_tokens_per_second: float
    total_tokens_per_second: float
    num_stages: int
    num_replicas: int
    stage_utilization: tuple[float, ...]
    host_to_device_bytes: int
    device_to_host_bytes: int
    stall_seconds: float
    predictor_mean_absolute_error_tokens: float | None
    predictor_sum_error: float | None


class Meter:
    """Counts tokens as they pass through the stages, so a preempted row's prompt counts as often as it was computed."""

    def __init__(self, num_stages: int, num_replicas: int = 1) -> None:
        self.prompt_tokens = 0
        self.output_tokens = 0
        self._stage_seconds = np.zeros((num_replicas, num_stages))
        self._host_to_device_bytes = 0
        self._device_to_host_bytes = 0
        self._stall_seconds = 0.0
        self._num_predicted = 0
        self._absolute_error_tokens = 0
        self._error_tokens = 0
        self._real_tokens = 0

    def add_step(self, result: StepResult, num_prompt_tokens: int, num_output_tokens: int, replica: int = 0) -> None:
        self.prompt_tokens += num_prompt_tokens
        self.output_tokens += num_output_tokens
        self._stage_seconds[replica] += seconds_without_stalls(result.stage_seconds, result.link_uses)
        for use in result.link_uses:
            self._host_to_device_bytes += use.loaded_bytes
            self._device_to_host_bytes += use.stored_bytes
            self._stall_seconds += use.stall_seconds

    def add_outcomes(self, outcomes: Sequence[Outcome]) -> None:
        """Compares the forecast of completion lengths with what came, one comparison a sample."""
        for outcome in outcomes:
            if outcome.predicted_tokens is None:
                continue
            for sample in outcome.samples:
                if sample.completion_tokens is None:
                    continue
                error_tokens = outcome.predicted_tokens - sample.completion_tokens
                self._num_predicted += 1
                self._absolute_error_tokens += abs(error_tokens)
                self._error_tokens += error_tokens
                self._real_tokens += sample.completion_tokens

    def measured(self, generate_seconds: float) -> Measured:
        """`generate_seconds` is the time in which the steps were run; rates are 0 where there was none."""
        per_second = 1 / generate_seconds if generate_seconds > 0 else 0.0
        return Measured(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.output_tokens,
            output_tokens_per_second=self.output_tokens * per_second,
            total_tokens_per_second=(self.prompt_tokens + self.output_tokens) * per_second,
            num_stages=self._stage_seconds.shape[1],
            num_replicas=self._stage_seconds.shape[0],
            stage_utilization=tuple((self._stage_seconds.ravel() * per_second).tolist()),
            host_to_device_bytes=self._host_to_device_bytes,
            device_to_host_bytes=self._device_to_host_bytes,
            stall_seconds=self._stall_seconds,
            predictor_mean_absolute_error_tokens=(
                self._absolute_error_tokens / self._num_predicted if self._num_predicted else None
            ),
            predictor_sum_error=self._error_tokens / self._real_tokens if self._real_tokens else None,
        )
