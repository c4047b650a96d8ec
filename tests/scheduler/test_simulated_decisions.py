"""A real run and a simulated one take the same decisions, if the simulated clock is fed the real run's times."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from batchpipe.cost.model import StepWork
from batchpipe.cost.online import OnlineCost
from batchpipe.pipeline.base import Pipeline
from batchpipe.pipeline.simulated import SimulatedPipeline
from batchpipe.predict.online import OnlinePredictor
from batchpipe.predict.quantile import QuantileClassifier
from batchpipe.runner.engine import Engine
from batchpipe.sample.rng import stream_of
from batchpipe.types import Capacity, FinishedRequest, Request, Step, StepResult
from tests.cost.formula_cost import FormulaCost
from tests.pipeline.test_engine_sameness import open_tiny
from tests.scheduler.drive import run_engine
from tests.scheduler.scheduler_cases import request

EOS = 7
NUM_STAGES = 2


# A prior that is plainly wrong, so that what the scheduler learns of time decides.
FLAT_COST = FormulaCost(lambda stage, work: 1e-3 * (1 + stage) * (1 + work.num_tokens // 16), NUM_STAGES)


class Recorded:
    """Passes on to another pipeline, and keeps what was decided and how long it took."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.decisions: list[tuple[object, ...]] = []
        self.stage_seconds: list[tuple[float, ...]] = []
        self._pipeline = pipeline
        self.capacity, self.device_names = pipeline.capacity, pipeline.device_names
        self.ready, self.restart = pipeline.ready, pipeline.restart

    def submit(self, step: Step) -> None:
        arrays = (step.query_lengths, step.context_lengths, step.block_tables, step.samples, step.copied_blocks)
        self.decisions.append((step.sequence_ids, step.released, *(array.tolist() for array in arrays)))
        self._pipeline.submit(step)

    def collect(self) -> StepResult:
        result = self._pipeline.collect()
        self.stage_seconds.append(result.stage_seconds)
        return result


class Replayed(SimulatedPipeline):
    """Takes the given times, a step each, for its own."""

    def __init__(self, capacity: Capacity, lengths: dict[int, int], stage_seconds: Sequence[tuple[float, ...]]) -> None:
        super().__init__(capacity, FLAT_COST, lengths, EOS)
        self._times = iter(stage_seconds)

    def _stage_seconds(self, work: StepWork) -> tuple[float, ...]:
        return next(self._times)


def rows() -> list[Request]:
    return [request(i, 3 + i * 7 % 23, num_shared=9, max_tokens=4 + i * 5 % 24) for i in range(40)]


def run_recorded(pipeline: Recorded, schedule: str) -> list[FinishedRequest]:
    predictor = OnlinePredictor(QuantileClassifier.shipped(), 32)
    engine = Engine([pipeline], schedule, frozenset({EOS}), lambda params: None, predictor, OnlineCost(FLAT_COST))  # type: ignore[list-item]
    return run_engine(engine, rows())


@pytest.mark.parametrize("schedule", ["temporal", "temporal-published", "hybrid"])
def test_decisions_are_those_of_the_real_run(schedule: str) -> None:
    with open_tiny("llama", NUM_STAGES, 4, 48) as real:
        recorded = Recorded(real)
        finished = run_recorded(recorded, schedule)
        capacity = real.capacity
    assert len(finished) == 40
    lengths = {}
    for end in finished:
        tokens = end.completions[0].token_ids
        stream = stream_of(end.request.sampling.seed, end.request.key.row_id, 0)
        # A row that was cut at its limit would have gone on.
        lengths[stream] = len(tokens) if tokens[-1] == EOS else len(tokens) + 1
    assert len({len(end.completions[0].token_ids) for end in finished}) > 5
    simulated = Recorded(Replayed(capacity, lengths, recorded.stage_seconds))
    run_recorded(simulated, schedule)
    assert simulated.decisions == recorded.decisions
    assert np.ptp([len(decision[0]) for decision in recorded.decisions]) > 0  # type: ignore[arg-type]
