"""Runs a scheduler, or a whole engine, over a pipeline until every row has ended."""

from __future__ import annotations

from collections.abc import Iterable

from batchpipe.pipeline.base import Pipeline
from batchpipe.runner.engine import Engine
from batchpipe.scheduler.scheduler import Scheduler
from batchpipe.types import FinishedRequest, Request, Step


def submit_steps(scheduler: Scheduler, pipeline: Pipeline) -> list[Step]:
    """Submits steps until the pipeline is full or the scheduler has none; returns them."""
    steps = []
    while scheduler.has_room and (step := scheduler.next_step()):
        assert len(step.token_ids) <= pipeline.capacity.max_step_tokens
        assert len(step.sequence_ids) <= pipeline.capacity.max_batch_sequences
        pipeline.submit(step)
        steps.append(step)
    return steps


def drive(scheduler: Scheduler, pipeline: Pipeline, requests: Iterable[Request]) -> list[FinishedRequest]:
    scheduler.add(requests)
    finished: list[FinishedRequest] = []
    while not scheduler.idle:
        submit_steps(scheduler, pipeline)
        if scheduler.num_in_flight:
            scheduler.record(pipeline.collect())
        scheduler.check_integrity()
        finished += scheduler.take_finished()
    return finished


def run_engine(engine: Engine, requests: Iterable[Request]) -> list[FinishedRequest]:
    """Every request's end, in the order in which they ended."""
    engine.add(requests)
    finished: list[FinishedRequest] = []
    while not engine.idle:
        finished += engine.advance()
        for replica in engine.replicas:
            replica.scheduler.check_integrity()
    return finished
