"""A pipeline that loses a worker once is started anew and no text changes; the second loss ends the run."""

from __future__ import annotations

import logging

import pytest

from batchpipe.errors import WorkerError
from batchpipe.pipeline.fake import FakePipeline
from batchpipe.runner.engine import Engine
from batchpipe.types import FinishedRequest, Step, StepResult
from tests.scheduler.drive import run_engine
from tests.scheduler.scheduler_cases import EOS, VOCABULARY, capacity, expected, fake, request

LOSSES = ("submit", "ready", "collect")


class Fragile(FakePipeline):
    """Loses a worker at some of the calls of one method."""

    def __init__(self, method: str, losing_calls: tuple[int, ...]) -> None:
        super().__init__(capacity(max_batches=2), VOCABULARY, EOS)
        self.num_restarts = 0
        self._method = method
        self._losing_calls = losing_calls
        self._num_calls = 0

    def submit(self, step: Step) -> None:
        self._called("submit")
        super().submit(step)

    def ready(self) -> bool:
        self._called("ready")
        return super().ready()

    def collect(self) -> StepResult:
        self._called("collect")
        return super().collect()

    def restart(self) -> None:
        self.num_restarts += 1
        super().restart()

    def _called(self, method: str) -> None:
        self._num_calls += method == self._method
        if method == self._method and self._num_calls in self._losing_calls:
            raise WorkerError("the process of stage 0 of 1 was ended by SIGKILL")


def finished_by(*pipelines: FakePipeline) -> list[FinishedRequest]:
    engine = Engine(pipelines, "hybrid", frozenset({EOS}), lambda params: None)
    return run_engine(engine, [request(i, 5 + i, max_tokens=12) for i in range(20)])


@pytest.mark.parametrize("method", LOSSES)
def test_the_first_loss_costs_no_row_and_changes_no_text(method: str, caplog: pytest.LogCaptureFixture) -> None:
    """Two replicas, so that the engine asks which one is ready."""
    fragile, sound = Fragile(method, (4,)), fake(capacity())
    finished = finished_by(fragile, sound)
    assert fragile.num_restarts == 1
    assert sorted(end.request.key.index for end in finished) == list(range(20))
    assert all(end.completions == (expected(end.request, sound),) for end in finished)
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "ended by SIGKILL; starting the pipeline again" in warning.getMessage()


@pytest.mark.parametrize("method", LOSSES)
def test_the_second_loss_is_raised(method: str) -> None:
    fragile = Fragile(method, (4, 7))
    with pytest.raises(WorkerError, match="ended by SIGKILL"):
        finished_by(fragile, fake(capacity()))
    assert fragile.num_restarts == 1
