"""How long steps take on one stage, beside what memory and arithmetic allow."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

from batchpipe.job.spec import EngineSpec
from batchpipe.model.describe import describe_model
from batchpipe.placement.machine import this_machine
from batchpipe.placement.open import stage_specs
from batchpipe.placement.stage_split import split_stages
from batchpipe.profiling.stage_time import TimedStage, row_seconds
from batchpipe.profiling.steps import Shape
from benchmarks.gpu.case import Case
from benchmarks.gpu.machine import ceilings

_MEASURE_SECONDS = 10.0


def steps(case: Case) -> None:
    """Decodes and prompts of the case's shape, and choosing a token of its vocabulary."""
    folder = case.saved_model()
    case.attempt("floors and times of steps", lambda: _steps(case, folder))


def _steps(case: Case, folder: Path) -> dict[str, Any]:
    info = describe_model(folder, "bfloat16", device=case.device)
    engine = EngineSpec.model_validate({"device": case.device, "num_stages": 1})
    machine = this_machine(engine)
    split = split_stages(machine, engine, info)
    [spec] = stage_specs(engine, info, split, machine.block_tokens(engine, info))
    limits = ceilings(case)
    num_sequences, num_tokens = (4, 40) if case.tiny else (128, 1024)
    shapes = {
        f"{num_sequences} decodes behind {num_tokens} tokens": Shape.decodes(num_sequences, num_tokens),
        f"8 decodes behind {num_tokens} tokens": Shape.decodes(8, num_tokens),
        f"a prompt of {num_tokens} tokens": Shape.prompt(num_tokens),
    }
    stage = TimedStage(spec, info.num_layers)
    seconds = stage.step_seconds(list(shapes.values()), 1.0 if case.tiny else _MEASURE_SECONDS)
    kv_token_bytes = info.kv_bytes_per_token_layer * info.num_layers
    figures: dict[str, Any] = {}
    layer_bytes, head_bytes = sum(info.layer_weight_bytes), 2 * info.vocabulary_size * info.hidden_size
    for name, shape in shapes.items():
        read_bytes = layer_bytes + shape.work.decode_context_tokens * kv_token_bytes
        read_bytes += head_bytes if shape.num_drawn else 0
        # Two operations and two bytes a weight.
        flops = shape.num_tokens * layer_bytes + shape.num_drawn * head_bytes
        floor = max(read_bytes / limits["copy_bytes_per_second"], flops / limits["bf16_flops_per_second"])
        figures[name] = {"seconds": seconds[shape], "floor_seconds": floor, "times_floor": seconds[shape] / floor}
        figures[name] |= _queued(case, stage, shape)
    greedy_seconds, random_seconds = row_seconds(spec)
    return {"steps": figures, "greedy_row_seconds": greedy_seconds, "sampled_row_seconds": random_seconds}


def _queued(case: Case, stage: TimedStage, shape: Shape) -> dict[str, float]:
    """As a job runs them: the host tells the device of the next step while it computes this one."""
    step = stage.prepared(shape)
    seconds = case.queued_seconds(lambda: stage.compute(step))
    started = perf_counter()
    stage.compute(step)
    host_seconds = perf_counter() - started
    case.wait()
    return {"queued_seconds": seconds, "host_seconds": host_seconds}
