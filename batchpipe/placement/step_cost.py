"""Where step times come from: a kept profile, a hardware file, or a quick look at the processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from time import perf_counter

import torch

from batchpipe.cost.hardware import Device, Hardware, known_hardware, load_hardware
from batchpipe.cost.model import CostModel
from batchpipe.cost.profile import find_profile
from batchpipe.cost.profile_cost import ProfileCost
from batchpipe.cost.roofline import RooflineCost
from batchpipe.errors import JobError
from batchpipe.model.describe import ModelInfo
from batchpipe.placement.machine import Machine
from batchpipe.placement.stage_split import StageSplit

# A quick look at a processor without a profile: seconds for its products and for its memory.
_LOOK_SECONDS = 0.5
_ESTIMATE = "estimate; `batchpipe profile` measures"


@dataclass(frozen=True, slots=True)
class StepCost:
    """Step times of a split's stages. source: where they come from, for people."""

    model: CostModel
    source: str


def known_cost(machine: Machine, split: StageSplit, info: ModelInfo) -> StepCost | None:
    """From a hardware file or a kept profile; None for a device of which neither says anything.

    Raises JobError where the kept profile is damaged or belongs to another model.
    """
    if machine.hardware is not None:
        model = RooflineCost(machine.hardware, info, split.layers)
        return StepCost(model, f"roofline of {machine.hardware.origin}")
    device_name = machine.stage_device_name(split.num_pools)
    profile = find_profile(info.name, device_name, info.dtype)
    if profile is not None:
        profile.check_fits("the kept profile", info, device_name)
        return StepCost(ProfileCost(profile, split.layers), f"profile of {profile.measured_on}")
    device = _known_device(device_name) if split.device == "cuda" else None
    return None if device is None else _estimate(device, device_name, split, info)


def estimated_cost(machine: Machine, split: StageSplit, info: ModelInfo) -> StepCost:
    """`known_cost`, or a roofline of what a quick look at the processor finds. Raises JobError for an unknown GPU."""
    known = known_cost(machine, split, info)
    if known is not None:
        return known
    name = machine.stage_device_name(split.num_pools)
    if split.device == "cuda":
        raise JobError(f"no hardware file describes {name}; `batchpipe profile` measures it, or give --hardware FILE")
    return _estimate(_looked_at(info.dtype), name, split, info)


def _estimate(device: Device, name: str, split: StageSplit, info: ModelInfo) -> StepCost:
    return StepCost(RooflineCost(Hardware(device, split.num_stages, name), info, split.layers), _ESTIMATE)


def _known_device(name: str) -> Device | None:
    devices = (load_hardware(str(path)).device for path in known_hardware().values())
    return next((device for device in devices if device.name.lower() in name.lower()), None)


@cache
def _looked_at(dtype: str) -> Device:
    """This processor, with the rates of a matrix product and of a sum over memory."""
    size = 1024
    matrix = torch.randn(size, size).to(getattr(torch, dtype))
    flops = 2.0 * size**3 / _fastest_seconds(lambda: matrix @ matrix)
    memory = torch.ones(64 << 20)
    bytes_per_second = memory.nbytes / _fastest_seconds(memory.sum)
    measured = {"memory_bytes_per_second": bytes_per_second, "bf16_flops_per_second": flops}
    return load_hardware("cpu").device.model_copy(update=measured)


def _fastest_seconds(work: Callable[[], object]) -> float:
    best = float("inf")
    end = perf_counter() + _LOOK_SECONDS
    while perf_counter() < end:
        started = perf_counter()
        work()
        best = min(best, perf_counter() - started)
    return best
