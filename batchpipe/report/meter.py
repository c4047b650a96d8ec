"""The meter: tokens, times and bytes of the steps and errors of the forecast, summed into metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from batchpipe.cost.model import seconds_without_stalls
from batchpipe.types import Outcome, StepResult


class Meter:
    """Counts tokens as they are computed: the prompt of a row that is preempted counts again when it is recomputed."""

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

    @property
    def busy_seconds(self) -> float:
        """In which stages computed, over all of them."""
        return float(self._stage_seconds.sum())

    def add_outcomes(self, outcomes: Sequence[Outcome]) -> None:
        """Compares the predicted completion length with the real one, for each sample."""
        for outcome in outcomes:
            if outcome.predicted_tokens is None:
                continue
            for real_tokens in (sample.completion_tokens for sample in outcome.samples):
                if real_tokens is None:
                    continue
                error_tokens = outcome.predicted_tokens - real_tokens
                self._num_predicted += 1
                self._absolute_error_tokens += abs(error_tokens)
                self._error_tokens += error_tokens
                self._real_tokens += real_tokens

    def measured(self, generate_seconds: float) -> dict[str, Any]:
        """Fields of `RunMetrics` by name. The steps ran in `generate_seconds`; if that is 0, so are all rates."""
        per_second = 1 / generate_seconds if generate_seconds > 0 else 0.0
        num_replicas, num_stages = self._stage_seconds.shape
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.output_tokens,
            "output_tokens_per_second": self.output_tokens * per_second,
            "total_tokens_per_second": (self.prompt_tokens + self.output_tokens) * per_second,
            "num_stages": num_stages,
            "num_replicas": num_replicas,
            "stage_utilization": tuple((self._stage_seconds.ravel() * per_second).tolist()),
            "host_to_device_bytes": self._host_to_device_bytes,
            "device_to_host_bytes": self._device_to_host_bytes,
            "stall_seconds": self._stall_seconds,
            "predictor_mean_absolute_error_tokens": (
                self._absolute_error_tokens / self._num_predicted if self._num_predicted else None
            ),
            "predictor_sum_error": self._error_tokens / self._real_tokens if self._real_tokens else None,
        }
