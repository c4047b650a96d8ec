"""A whole run on a virtual clock: the engine and schedulers of a device run, over pipelines without a model."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from batchpipe.pipeline.simulated import SimulatedPipeline
from batchpipe.predict.base import LengthPredictor
from batchpipe.runner.engine import Engine
from batchpipe.runner.gc_tuning import calm_collector
from batchpipe.types import Request


@dataclass(frozen=True, slots=True)
class SimulatedRun:
    """The result of a simulated run.

    num_failed: requests that end with an error code, such as one whose KV can never fit.
    output_tokens: of all samples, without recomputed ones. num_recomputed_tokens: KV lost to preemptions and computed
    again. stage_utilization: the share of the time that each stage computed. stage_stall_shares: the share that it
    waited for KV from the host. loaded_bytes, stored_bytes: over all stages' links between the two tiers of KV.
    peak_used_blocks: the most of any scheduler. planner_seconds: real time that the schedulers took.
    """

    seconds: float
    num_requests: int
    num_failed: int
    prompt_tokens: int
    output_tokens: int
    stage_utilization: tuple[float, ...]
    stage_stall_shares: tuple[float, ...]
    loaded_bytes: int
    stored_bytes: int
    num_steps: int
    num_phase_switches: int
    num_preemptions: int
    num_recomputed_tokens: int
    peak_used_blocks: int
    planner_seconds: float

    @property
    def output_tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds if self.seconds > 0 else 0.0


def simulate(
    pipelines: Sequence[SimulatedPipeline],
    requests: Sequence[Request],
    schedule: str,
    *,
    predictor: LengthPredictor | None = None,
    arrival_seconds: Sequence[float] | None = None,
) -> SimulatedRun:
    """Runs all requests to their end on new pipelines that share their stages; mostly there is one.

    Policies that look ahead use the pipelines' own cost model, so their forecast of time is exact but for its noise.
    arrival_seconds: the time at which each request becomes known, increasing; None: all are known at the start.
    """
    stages, cost, eos_token_id = pipelines[0].stages, pipelines[0].cost, pipelines[0].eos_token_id
    assert all(pipeline.stages is stages for pipeline in pipelines), "pipelines on clocks of their own"
    arrivals = [0.0] * len(requests) if arrival_seconds is None else arrival_seconds
    coming = deque(zip(arrivals, requests, strict=True))
    num_failed = output_tokens = 0
    engine = Engine(pipelines, schedule, frozenset({eos_token_id}), lambda params: None, predictor, cost)
    with calm_collector():
        while coming or not engine.idle:
            if engine.idle:
                stages.wait_until(coming[0][0])
            arrived = []
            while coming and coming[0][0] <= stages.now_seconds:
                arrived.append(coming.popleft()[1])
            engine.add(arrived)
            for end in engine.advance():
                num_failed += any(completion.error_code is not None for completion in end.completions)
                output_tokens += sum(len(completion.token_ids) for completion in end.completions)
    schedulers = [replica.scheduler for replica in engine.replicas]
    seconds = stages.now_seconds
    link_uses = [step.link_uses for pipeline in pipelines for step in pipeline.steps if step.link_uses]
    stall_seconds = [sum(uses[stage].stall_seconds for uses in link_uses) for stage in range(cost.num_stages)]
    return SimulatedRun(
        seconds=seconds,
        num_requests=len(requests),
        num_failed=num_failed,
        prompt_tokens=sum(len(request.prompt_token_ids) for request in requests),
        output_tokens=output_tokens,
        stage_utilization=tuple(busy / seconds if seconds > 0 else 0.0 for busy in stages.busy_seconds),
        stage_stall_shares=tuple(stall / seconds if seconds > 0 else 0.0 for stall in stall_seconds),
        loaded_bytes=sum(use.loaded_bytes for uses in link_uses for use in uses),
        stored_bytes=sum(use.stored_bytes for uses in link_uses for use in uses),
        num_steps=sum(scheduler.num_steps for scheduler in schedulers),
        num_phase_switches=sum(scheduler.num_phase_switches for scheduler in schedulers),
        num_preemptions=sum(scheduler.num_preemptions for scheduler in schedulers),
        num_recomputed_tokens=sum(scheduler.num_recomputed_tokens for scheduler in schedulers),
        peak_used_blocks=max(scheduler.ledger.peak_used_blocks for scheduler in schedulers),
        planner_seconds=sum(replica.planner_seconds for replica in engine.replicas),
    )
