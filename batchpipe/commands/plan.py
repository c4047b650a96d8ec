"""`batchpipe plan`: what a job would take, by running its own scheduler over its own rows on a virtual clock."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from batchpipe.commands.plan_lengths import Lengths
from batchpipe.errors import InputError
from batchpipe.job import Job
from batchpipe.job.spec import EngineSpec
from batchpipe.pipeline.simulated import SimulatedPipeline
from batchpipe.placement.machine import described_machine, this_machine
from batchpipe.placement.placement import Placement, place
from batchpipe.placement.stage_split import stage_layers, stage_weight_bytes
from batchpipe.placement.step_cost import estimated_cost
from batchpipe.runner.open_job import open_job
from batchpipe.runner.prepare import Prepared, complete
from batchpipe.runner.simulate import SimulatedRun, simulate
from batchpipe.types import FailedRow, Request

# Rows that are simulated; what more there is takes as long as the later half of these.
SAMPLE_ROWS = 4000
TRIAL_ROWS = 1000  # for each setting that is tried
# A setting is worth naming if it saves this part of the time.
WORTH_NAMING = 0.03


@dataclass(frozen=True)
class Setting:
    """How the job would be run: everything that a knob can turn."""

    engine: EngineSpec
    schedule: str


@dataclass(frozen=True)
class Outlook:
    """One setting on one machine, simulated."""

    placement: Placement
    times_from: str
    run: SimulatedRun
    seconds: float  # of the whole input


def plan_job(job: Job, hardware: str | None = None, *, own_process: bool = False) -> dict[str, Any]:
    """The plan, for this machine or for the one that `hardware` names. No weights are loaded, and none need be here.

    own_process: as in `commands.validate.validate_job`.
    Raises what a run would raise before it loads the model, and JobError where the machine does not fit the job.
    """
    opened = open_job(job, device="cuda" if hardware else None, needs_weights=False)
    prepared = complete(opened, needs_weights=False, computes=not own_process)
    requests, num_failed = _first_rows(prepared)
    info = prepared.info
    if not requests:
        raise InputError(f"no row of the first {num_failed} can run; `batchpipe validate` says why")
    exhausted = len(requests) + num_failed < SAMPLE_ROWS
    num_rows = len(requests) if exhausted else prepared.estimated_rows() * len(requests) / (len(requests) + num_failed)
    lengths = Lengths(prepared, requests)
    bench = _Bench(prepared, lengths, num_rows, hardware)
    setting = Setting(job.engine, prepared.schedule)
    rows = range(len(requests))
    outlook = bench.outlook(setting, rows)
    low, high = (bench.outlook(setting, rows, scale).seconds for scale in lengths.scales)
    run, placement, capacity = outlook.run, outlook.placement, outlook.placement.capacity
    split, kv_blocks = placement.split, max(capacity.num_blocks, capacity.num_host_blocks)
    per_row = num_rows / len(requests)
    num_prompt_tokens = sum(len(request.prompt_token_ids) * per_row for request in requests)
    num_output_tokens = sum(
        int(length) * request.sampling.n * per_row for length, request in zip(lengths.of(rows), requests, strict=True)
    )
    hidden_bytes = info.hidden_size * (4 if info.dtype == "float32" else 2)
    return {
        "model": prepared.model.name,
        "dtype": info.dtype,
        "hardware": placement.device_name,
        "times_from": outlook.times_from,
        "lengths_from": lengths.source,
        "num_stages": split.num_stages,
        "num_replicas": split.num_replicas,
        "schedule": setting.schedule,
        "weight_bytes_per_stage": placement.weight_bytes_per_stage,
        "kv_bytes_per_stage": placement.kv_bytes_per_stage,
        "kv_host_bytes_per_stage": placement.kv_host_bytes_per_stage,
        "kv_capacity_tokens": kv_blocks * capacity.block_tokens,
        "peak_kv_fraction": run.peak_used_blocks / kv_blocks,
        "offload": placement.offload.mode,
        "offload_reason": placement.offload.reason,
        "rows": round(num_rows),
        "simulated_rows": len(requests),
        "prompt_tokens": round(num_prompt_tokens),
        "completion_tokens": round(num_output_tokens),
        "generate_seconds": outlook.seconds,
        "generate_seconds_low": low,
        "generate_seconds_high": high,
        "output_tokens_per_second": num_output_tokens / outlook.seconds,
        "stage_utilization": run.stage_utilization,
        "phase_switches": run.num_phase_switches,
        "preemptions": run.num_preemptions,
        "recomputed_tokens": run.num_recomputed_tokens,
        "link_bytes": round((num_prompt_tokens + num_output_tokens) * (split.num_stages - 1) * hidden_bytes),
        "planner_fraction": run.planner_seconds / run.seconds,
        "knob": bench.best_knob(setting, outlook),
    }


def _first_rows(prepared: Prepared) -> tuple[list[Request], int]:
    items = list(islice(prepared.requests(), SAMPLE_ROWS))
    requests = [item for item in items if not isinstance(item, FailedRow)]
    return requests, len(items) - len(requests)


class _Bench:
    """Simulates settings of one job over its first rows."""

    def __init__(self, prepared: Prepared, lengths: Lengths, num_rows: float, hardware: str | None) -> None:
        self._prepared = prepared
        self._lengths = lengths
        self._num_rows = num_rows
        # Looked at once, so that all settings have the same memory.
        self._machine = described_machine(hardware) if hardware else this_machine(prepared.job.engine)

    def outlook(self, setting: Setting, rows: Sequence[int], scale: float = 1.0) -> Outlook:
        """`rows` are numbers of the rows looked at; where it is all of them, the rest of the input is added."""
        info = self._prepared.info
        placement = place(self._machine, setting.engine, info, self._prepared.num_sequences())
        # A run chooses by what it knows of step times, which may be less than what is simulated with.
        cost = placement.cost or estimated_cost(self._machine, placement.split, info)
        num_replicas = placement.split.num_replicas
        own = rows[::num_replicas]

        def run(rows: Sequence[int]) -> SimulatedRun:
            by_stream = self._lengths.by_stream(rows, scale)
            pipeline = SimulatedPipeline(placement.capacity, cost.model, by_stream, self._lengths.eos_token_id)
            requests = [self._lengths.requests[row] for row in rows]
            return simulate([pipeline], requests, setting.schedule, predictor=self._lengths.predictor())

        whole = run(own)
        seconds = whole.seconds
        is_all = len(rows) == len(self._lengths.requests)
        left = (self._num_rows - len(rows)) / num_replicas if is_all else 0.0
        if left > 0 and len(own) > 1:
            half = own[: len(own) // 2]
            seconds += left * (whole.seconds - run(half).seconds) / (len(own) - len(half))
        return Outlook(placement, cost.source, whole, seconds)

    def best_knob(self, setting: Setting, outlook: Outlook) -> dict[str, Any] | None:
        """The one change that saves most, tried on fewer rows; None where none is worth naming."""
        rows = range(min(TRIAL_ROWS, len(self._lengths.requests)))
        before = self.outlook(setting, rows).seconds
        best: dict[str, Any] | None = None
        saved_most = WORTH_NAMING
        for key, value, changed in self._knobs(setting, outlook):
            saved = 1 - self.outlook(changed, rows).seconds / before
            if saved > saved_most:
                saved_most = saved
                best = {"key": key, "value": value, "saves_fraction": saved}
        return best

    def _knobs(self, setting: Setting, outlook: Outlook) -> Iterator[tuple[str, Any, Setting]]:
        def engine(key: str, value: Any) -> tuple[str, Any, Setting]:
            changed = EngineSpec.model_validate(setting.engine.model_dump() | {key: value})
            return f"engine.{key}", value, replace(setting, engine=changed)

        placement, split = outlook.placement, outlook.placement.split
        yield engine("max_batch_sequences", 2 * placement.capacity.max_batch_sequences)
        on_cpu = split.device == "cpu"
        room_bytes = min(stage.free_bytes for stage in placement.stages)
        if on_cpu:
            room_bytes = room_bytes // split.num_pools - max(placement.kv_host_bytes_per_stage)
        more_bytes = 2 * max(placement.kv_bytes_per_stage)
        may_grow = placement.offload.mode == "none" or more_bytes < setting.engine.kv_host_memory
        if more_bytes <= room_bytes and may_grow:
            yield engine("kv_device_memory", more_bytes)
        if not on_cpu and setting.engine.offload in ("auto", "none"):
            for num_stages in (n for n in range(1, split.num_pools + 1) if split.num_pools % n == 0):
                layers = stage_layers(self._prepared.info, num_stages)
                weights = max(stage_weight_bytes(self._prepared.info, layers))
                if num_stages != split.num_stages and weights < 0.8 * self._machine.free_bytes:
                    yield engine("num_stages", num_stages)
        for schedule in ("temporal", "hybrid"):
            if schedule != setting.schedule:
                yield "plan.schedule", schedule, replace(setting, schedule=schedule)


def describe_plan(plan: dict[str, Any]) -> str:
    """The plan in some lines for people."""
    gib = 2**30
    lines = [
        f"{plan['model']} ({plan['dtype']}) on {plan['hardware']}: {plan['num_stages']} stages, "
        f"{plan['num_replicas']} replicas, schedule {plan['schedule']}",
        f"  step times: {plan['times_from']}; lengths: {plan['lengths_from']}",
        f"  {plan['rows']:,} rows, {plan['prompt_tokens']:,} tokens in, about {plan['completion_tokens']:,} out",
        f"  about {_duration(plan['generate_seconds'])} ({_duration(plan['generate_seconds_low'])} to "
        f"{_duration(plan['generate_seconds_high'])}), {plan['output_tokens_per_second']:,.0f} output tokens/s",
    ]
    stages = ("weight_bytes_per_stage", "kv_bytes_per_stage", "kv_host_bytes_per_stage", "stage_utilization")
    for index, (weights, kv, host_kv, busy) in enumerate(zip(*(plan[key] for key in stages), strict=True)):
        host = f" and {host_kv / gib:.2f} GiB on the host" if host_kv else ""
        lines.append(f"  stage {index}: {weights / gib:.2f} GiB weights, {kv / gib:.2f} GiB KV{host}, busy {busy:.0%}")
    lines.append(f"  KV offload: {plan['offload']} ({plan['offload_reason']})")
    lines.append(
        f"  KV for {plan['kv_capacity_tokens']:,} tokens, {plan['peak_kv_fraction']:.0%} in use at most; "
        f"{plan['phase_switches']} phase switches, {plan['preemptions']} preemptions"
    )
    if (knob := plan["knob"]) is not None:
        lines.append(f"  {knob['key']}={knob['value']} would save {knob['saves_fraction']:.0%} of the time")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
