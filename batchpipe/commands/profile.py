"""`batchpipe profile`: measures this machine with a model, for planning."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

from batchpipe.cost.profile import profile_path, save_profile
from batchpipe.errors import JobError
from batchpipe.job import load_job
from batchpipe.job.spec import EngineSpec, ModelSpec
from batchpipe.model.describe import describe_model
from batchpipe.model.resolve import resolve_model
from batchpipe.placement.devices import resolve_device
from batchpipe.placement.machine import this_machine
from batchpipe.placement.open import stage_specs
from batchpipe.placement.stage_split import split_stages
from batchpipe.profiling.measure import measure


def profile_command(model_or_job: str, output: Path | None, seconds: float) -> dict[str, Any]:
    """Measures for about `seconds` and writes the profile to `output`, or to where runs look for it where it is None.

    model_or_job: a job file (*.yaml, *.yml), or what model.name of a job may be. What is measured is one stage as that
    job would run it: its share of the processors, its attention kernels, its blocks. Returns what the command prints.
    Raises JobError, ModelError or MemoryLimitError.
    """
    if not seconds > 0:
        raise JobError(f"--seconds: {seconds} is not above 0; a hundred give steady medians")
    started = perf_counter()
    model_spec, engine = _specs(model_or_job)
    model = resolve_model(model_spec)
    info = describe_model(
        model.folder,
        model_spec.dtype,
        name=model.name,
        device=resolve_device(engine),
        trust_remote_code=model_spec.trust_remote_code,
    )
    machine = this_machine(engine)
    split = split_stages(machine, engine, info)
    spec = stage_specs(engine, info, split, machine.block_tokens(engine, info))[0]
    profile = measure(info, spec, seconds)
    path = output or profile_path(model.name, profile.device, info.dtype)
    save_profile(profile, path)
    return {
        "file": str(path),
        "seconds": round(perf_counter() - started, 1),
        "device": profile.device,
        "decode_fit": profile.decode_fit.model_dump(),
        "held_out": profile.held_out.model_dump(),
    }


def _specs(model_or_job: str) -> tuple[ModelSpec, EngineSpec]:
    path = Path(model_or_job).expanduser()
    if path.suffix in (".yaml", ".yml"):
        job = load_job(path)
        return job.model, job.engine
    name = str(path.absolute()) if path.exists() else model_or_job
    return ModelSpec(name=name), EngineSpec()
