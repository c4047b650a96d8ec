"""Where step times come from: a kept profile, a hardware file, or a quick look at the processor."""

from __future__ import annotations

from dataclasses import dataclass

from batchpipe.cost.hardware import Device, Hardware, known_hardware, load_hardware
from batchpipe.cost.model import CostModel
from batchpipe.cost.profile import find_profile
from batchpipe.cost.profile_cost import ProfileCost
from batchpipe.cost.roofline import RooflineCost
from batchpipe.errors import JobError
from batchpipe.model.describe import ModelInfo
from batchpipe.placement.machine import Machine
from batchpipe.placement.quick_look import quick_look
from batchpipe.placement.stage_split import StageSplit

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
    return _estimate(_looked_at(name, info.dtype), name, split, info)


def _estimate(device: Device, name: str, split: StageSplit, info: ModelInfo) -> StepCost:
    return StepCost(RooflineCost(Hardware(device, split.num_stages, name), info, split.layers), _ESTIMATE)


def _known_device(name: str) -> Device | None:
    devices = (load_hardware(str(path)).device for path in known_hardware().values())
    return next((device for device in devices if device.name.lower() in name.lower()), None)


def _looked_at(name: str, dtype: str) -> Device:
    """This processor, at the rates of a quick look."""
    rates = quick_look(name, dtype)
    measured = {
        "memory_bytes_per_second": rates.memory_bytes_per_second,
        "bf16_flops_per_second": rates.flops_per_second,
    }
    return load_hardware("cpu").device.model_copy(update=measured)
