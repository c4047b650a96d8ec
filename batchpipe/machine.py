"""What a plan is made for: this machine, as measured or guessed, or one that a hardware file describes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch

from batchpipe.attention.choose import choose_backend
from batchpipe.errors import JobError
from batchpipe.execute.memory import StageMemory, free_bytes
from batchpipe.execute.open import (
    fewest_stages,
    num_threads,
    resolve_device,
    resolve_num_replicas,
    resolve_num_stages,
    stage_layers,
)
from batchpipe.execute.stage import device_name
from batchpipe.job.spec import EngineSpec
from batchpipe.model.describe import ModelInfo
from batchpipe.plan.cost import CostModel
from batchpipe.plan.geometry import ModelGeometry
from batchpipe.plan.hardware import Device, Hardware, known_hardware, load_hardware
from batchpipe.plan.live_cost import LiveCost
from batchpipe.plan.profile import find_profile
from batchpipe.plan.profile_cost import ProfileCost
from batchpipe.plan.roofline import RooflineCost

GPU_BLOCK_TOKENS = 16
# A quick look at a processor without a profile: seconds for its products and for its memory.
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Machine:
    """`free_bytes` of one device before weights; `cost` makes a cost model of stages that hold these layers."""

    name: str
    device: str  # cpu or cuda
    free_bytes: int
    block_tokens: int
    source: str  # where step times come from
    cost: Callable[[Sequence[range]], CostModel]
    num_stages: int
    num_replicas: int

    def stage_memory(self, info: ModelInfo, layers: Sequence[range]) -> list[StageMemory]:
        """What each stage has free once its weights are loaded; on the CPU all stages share one memory.

        Raises JobError where weights do not fit.
        """
        weight_bytes = stage_weight_bytes(info, layers)
        if self.device == "cpu":
            free = [self.free_bytes - self.num_replicas * sum(weight_bytes)] * len(layers)
        else:
            free = [self.free_bytes - num_bytes for num_bytes in weight_bytes]
        if min(free) <= 0:
            raise JobError(
                f"engine.num_stages: {len(layers)} stages of {self.name} hold up to {max(weight_bytes) / 2**30:.1f} "
                f"GiB of weights each and {self.free_bytes / 2**30:.1f} GiB are free; ask for more stages"
            )
        return [
            StageMemory(free_bytes, len(own) * info.kv_bytes_per_token_layer * self.block_tokens, self.block_tokens)
            for free_bytes, own in zip(free, layers, strict=True)
        ]


def stage_weight_bytes(info: ModelInfo, layers: Sequence[range]) -> list[int]:
    """Of every stage; the embedding counts to the first and the head to the last, half of the rest each."""
    weight_bytes = [sum(info.layer_weight_bytes[layer] for layer in own) for own in layers]
    weight_bytes[0] += info.other_weight_bytes // 2
    weight_bytes[-1] += info.other_weight_bytes - info.other_weight_bytes // 2
    return weight_bytes


def this_machine(engine: EngineSpec, info: ModelInfo, model_name: str) -> Machine:
    """Times from a profile of this model on this device where there is one, else a roofline."""
    device = resolve_device(engine)
    num_stages = resolve_num_stages(engine, info, device)
    num_replicas = resolve_num_replicas(engine, device, num_stages)
    threads = max(1, num_threads(len(os.sched_getaffinity(0))) // (num_stages * num_replicas))
    name = device_name("cpu" if device == "cpu" else "cuda:0", threads)
    backend = choose_backend(engine.attention, torch.device(device), getattr(torch, info.dtype), info.head_dim)
    geometry = ModelGeometry.of(info)
    profile = find_profile(model_name, name, info.dtype)
    if profile is not None:
        profile.check_fits("the kept profile", geometry, name, info.dtype)
        source = f"profile of {profile.measured_on}"
        cost: Callable[[Sequence[range]], CostModel] = partial(ProfileCost, profile)
    else:
        source = "estimate; `batchpipe profile` measures"
        cost = partial(RooflineCost, Hardware(_guess(device, name, info.dtype), num_stages, name), geometry)
    return Machine(
        name=name,
        device=device,
        free_bytes=free_bytes("cpu" if device == "cpu" else "cuda:0"),
        block_tokens=backend.default_block_tokens if engine.block_tokens == "auto" else engine.block_tokens,
        source=source,
        cost=cost,
        num_stages=num_stages,
        num_replicas=num_replicas,
    )


def other_machine(name: str, engine: EngineSpec, info: ModelInfo) -> Machine:
    """One or more GPUs of a hardware file, as in `4xl20`. Raises JobError where the file or the engine does not fit."""
    hardware = load_hardware(name)
    geometry = ModelGeometry.of(info)
    usable_bytes = int(hardware.device.memory_bytes)
    if engine.num_stages == "auto":
        num_stages = fewest_stages(info.weight_bytes, usable_bytes, hardware.num_devices)
    else:
        num_stages = engine.num_stages
    num_replicas = hardware.num_devices // num_stages if engine.replicas == "auto" else engine.replicas
    if num_stages * num_replicas > hardware.num_devices or num_replicas < 1:
        raise JobError(
            f"engine.num_stages is {num_stages} with {max(1, num_replicas)} replicas and {name} has "
            f"{hardware.num_devices} devices; a stage needs one of its own"
        )
    return Machine(
        name=f"{hardware.num_devices} x {hardware.device.name}",
        device="cuda",
        free_bytes=usable_bytes,
        block_tokens=GPU_BLOCK_TOKENS if engine.block_tokens == "auto" else engine.block_tokens,
        source=f"roofline of {hardware.origin}",
        cost=lambda layers: RooflineCost(hardware, geometry, layers),
        num_stages=num_stages,
        num_replicas=num_replicas,
    )


def run_cost(engine: EngineSpec, info: ModelInfo, model_name: str) -> LiveCost | None:
    """What a run's planner takes step times from, corrected as it goes; None for one stage, which asks for none, and
    for devices of which nothing is known: their steps are taken to be as long as their tokens are many.
    """
    device = resolve_device(engine)
    num_stages = resolve_num_stages(engine, info, device)
    if num_stages == 1:
        return None
    layers = stage_layers(info, num_stages)
    threads = max(1, num_threads(len(os.sched_getaffinity(0))) // num_stages)
    name = device_name("cpu" if device == "cpu" else "cuda:0", threads)
    profile = find_profile(model_name, name, info.dtype)
    if profile is not None:
        return LiveCost(ProfileCost(profile, layers))
    known = _known_device(name) if device == "cuda" else None
    if known is None:
        return None
    return LiveCost(RooflineCost(Hardware(known, num_stages, name), ModelGeometry.of(info), layers))


def _known_device(name: str) -> Device | None:
    devices = (load_hardware(str(path)).device for path in known_hardware().values())
    return next((device for device in devices if device.name.lower() in name.lower()), None)


def _guess(device: str, name: str, dtype: str) -> Device:
    """The hardware file of a GPU of this name, or a quick look at the processor. Raises JobError for a GPU unknown."""
    if device == "cuda":
        known = _known_device(name)
        if known is not None:
            return known
        raise JobError(f"no hardware file describes {name}; `batchpipe profile` measures it, or give --hardware FILE")
    size = 1024
    matrix = torch.randn(size, size).to(getattr(torch, dtype))
    flops = 2.0 * size**3 / _fastest_seconds(lambda: matrix @ matrix)
    memory = torch.ones(64 << 20)
    bytes_per_second = memory.nbytes / _fastest_seconds(memory.sum)
    measured = {"memory_bytes_per_second": bytes_per_second, "bf16_flops_per_second": flops, "name": name}
    return load_hardware("cpu").device.model_copy(update=measured)


def _fastest_seconds(work: Callable[[], object]) -> float:
    best = float("inf")
    end = perf_counter() + _LOOK_SECONDS
    while perf_counter() < end:
        started = perf_counter()
        work()
        best = min(best, perf_counter() - started)
    return best
