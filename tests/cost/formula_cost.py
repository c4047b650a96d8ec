"""A cost model whose seconds are a test's own formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from batchpipe.cost.model import KvLink, StepWork


def _not_asked(stage: int, work: StepWork) -> float:
    raise AssertionError("this test's cost model tells no step times")


@dataclass(frozen=True)
class FormulaCost:
    """See `CostModel`. `seconds` takes a stage and the step's work; a handoff takes its time by the token."""

    seconds: Callable[[int, StepWork], float] = _not_asked
    num_stages: int = 1
    fixed_handoff_seconds: float = 0.0
    handoff_seconds_per_token: float = 0.0
    control_seconds: float = 0.0
    kv_links: tuple[KvLink, ...] = ()

    @property
    def distinct_stages(self) -> range:
        return range(self.num_stages)

    def stage_seconds(self, stage: int, work: StepWork) -> float:
        return self.seconds(stage, work)

    def handoff_seconds(self, num_tokens: int) -> float:
        return self.fixed_handoff_seconds + self.handoff_seconds_per_token * num_tokens
