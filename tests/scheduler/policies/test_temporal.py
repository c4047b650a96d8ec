"""The temporal schedule as a scheduler uses it, over a pipeline that only counts."""

from __future__ import annotations

import numpy as np
import pytest

from batchpipe.predict.base import Survival
from batchpipe.scheduler.scheduler import Scheduler
from batchpipe.types import Step
from tests.cost.formula_cost import FormulaCost
from tests.scheduler.drive import drive, submit_steps
from tests.scheduler.scheduler_cases import EOS, capacity, fake, request

TILES = FormulaCost(lambda stage, work: float(-(-work.num_tokens // 16)), num_stages=4)


def planner_of(schedule: str, *, curves: Survival | None = None, **offered: int) -> Scheduler:
    cost = TILES if offered.get("max_batches", 1) > 1 else None
    scheduler = Scheduler(
        capacity(**offered), schedule, frozenset({EOS}), lambda seed, row_id, sample: 0, lambda params: None, cost
    )
    scheduler.state.survival = curves
    return scheduler


def exactly(num_tokens: int) -> Survival:
    return Survival(np.array([0, num_tokens - 1, num_tokens], np.int32), np.array([[1.0, 1.0, 0.0]]))


@pytest.mark.parametrize("max_batches", [1, 3])
def test_with_lengths_known_memory_short_by_half_preempts_far_fewer(max_batches: int) -> None:
    offered = capacity(num_blocks=200, max_batches=max_batches, max_batch_sequences=64)
    rows = [request(i, 6 + 7 * i % 11, max_tokens=60, ignore_eos=True) for i in range(120)]
    preempted = {}
    for schedule in ("temporal", "hybrid"):
        scheduler = planner_of(
            schedule, curves=exactly(60), num_blocks=200, max_batches=max_batches, max_batch_sequences=64
        )
        assert len(drive(scheduler, fake(offered), rows)) == 120
        preempted[schedule] = scheduler.num_preemptions
    assert 4 * preempted["temporal"] < preempted["hybrid"], preempted


def test_without_a_forecast_every_row_is_taken_to_use_its_limit() -> None:
    offered = capacity(num_blocks=40)
    scheduler = planner_of("temporal", num_blocks=40)
    drive(scheduler, fake(offered), [request(i, 10, max_tokens=30) for i in range(24)])
    assert scheduler.num_preemptions == 0


def steps_of(scheduler: Scheduler, rows: int) -> list[Step]:
    pipeline = fake(scheduler.capacity)
    scheduler.add([request(i, 6, max_tokens=12, ignore_eos=True) for i in range(rows)])
    steps: list[Step] = []
    while not scheduler.idle:
        steps += submit_steps(scheduler, pipeline)
        scheduler.record(pipeline.collect())
    return steps


def test_prefills_come_first_and_then_ride_along() -> None:
    scheduler = planner_of(
        "temporal", curves=exactly(12), num_blocks=200, max_batches=4, num_stages=4, max_batch_sequences=64
    )
    steps = steps_of(scheduler, 200)
    kinds = [(bool((step.context_lengths >= 6).any()), bool((step.context_lengths < 6).any())) for step in steps]
    first_decode = next(i for i, (decodes, _) in enumerate(kinds) if decodes)
    assert first_decode > 4
    assert all(prefills for _, prefills in kinds[:first_decode])
    assert any(decodes and prefills for decodes, prefills in kinds[first_decode:])


def test_published_never_mixes_and_changes_phase_more_than_once() -> None:
    scheduler = planner_of("temporal-published", num_blocks=100, max_batches=4, num_stages=4, max_batch_sequences=64)
    for step in steps_of(scheduler, 200):
        assert len(set((step.context_lengths >= 6).tolist())) == 1
    assert scheduler.num_phase_switches > 2
