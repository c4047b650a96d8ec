"""What a plan is made for: this machine, as measured or guessed, or one that a hardware file describes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch

from batchpipe.attention.choose import choose_backend
from batchpipe.cost.hardware import Device, Hardware, known_hardware, load_hardware
from batchpipe.cost.model import CostModel, StepWork
from batchpipe.cost.model_shape import ModelShape
from batchpipe.cost.online import OnlineCost
from batchpipe.cost.profile import find_profile
from batchpipe.cost.profile_cost import ProfileCost
from batchpipe.cost.roofline import RooflineCost
from batchpipe.errors import JobError, MemoryLimitError
from batchpipe.job.spec import EngineSpec
from batchpipe.model.describe import ModelInfo
from batchpipe.pipeline.memory import StageMemory, check_host_memory, free_bytes, gib
from batchpipe.pipeline.stage import device_name
from batchpipe.placement.capacity import Layout, kv_blocks, max_batch_sequences
from batchpipe.placement.offload_mode import LEAST_STREAMS_PER_BLOCK, OffloadChoice, choose_offload
from batchpipe.placement.open import (
    fewest_stages,
    num_threads,
    resolve_device,
    resolve_layout,
    stage_layers,
)

GPU_BLOCK_TOKENS = 16
# A quick look at a processor without a profile: seconds for its products and for its memory.
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Place:
    """Where a model's copies stand. `free_bytes` of one device before weights; `host_free_bytes`: None, not known."""

    name: str
    layout: Layout
    free_bytes: int
    host_free_bytes: int | None
    block_tokens: int

    def stage_memory(self, info: ModelInfo) -> list[StageMemory]:
        """What each stage has free once its weights are loaded; on the CPU all stages share one memory.

        Raises MemoryLimitError where weights do not fit.
        """
        layers = self.layout.layers
        weight_bytes = stage_weight_bytes(info, layers)
        if self.layout.device == "cpu":
            free = [self.free_bytes - self.layout.num_replicas * sum(weight_bytes)] * len(layers)
        else:
            free = [self.free_bytes - num_bytes for num_bytes in weight_bytes]
        if min(free) <= 0:
            raise MemoryLimitError(
                f"engine.num_stages: {len(layers)} stages of {self.name} hold up to {gib(max(weight_bytes))} "
                f"of weights each and {gib(self.free_bytes)} are free; ask for more stages"
            )
        return [
            StageMemory(free_bytes, len(own) * info.kv_bytes_per_token_layer * self.block_tokens, self.block_tokens)
            for free_bytes, own in zip(free, layers, strict=True)
        ]


@dataclass(frozen=True)
class Machine(Place):
    """`cost` makes a cost model of stages that hold these layers."""

    source: str  # where step times come from
    cost: Callable[[Sequence[range]], CostModel]


def stage_weight_bytes(info: ModelInfo, layers: Sequence[range]) -> list[int]:
    """Of every stage; the embedding counts to the first and the head to the last, half of the rest each."""
    weight_bytes = [sum(info.layer_weight_bytes[layer] for layer in own) for own in layers]
    weight_bytes[0] += info.other_weight_bytes // 2
    weight_bytes[-1] += info.other_weight_bytes - info.other_weight_bytes // 2
    return weight_bytes


def choose_kv(
    engine: EngineSpec, info: ModelInfo, place: Place, cost: CostModel | None, num_sequences: int | None
) -> OffloadChoice:
    """How the run uses host memory for KV, decided before the model loads, so that what cannot be is said by then.

    cost: None where step times are not known. num_sequences: of the whole job, None where they are not counted.
    Raises MemoryLimitError where less is free than is asked for, and JobError.
    """
    if engine.offload == "none" or engine.kv_host_memory == 0:
        key = "offload is none" if engine.kv_host_memory else "kv_host_memory is 0"
        return OffloadChoice("none", f"engine.{key}")
    layout, stages = place.layout, place.stage_memory(info)
    if layout.device != "cpu" and place.host_free_bytes is not None:
        check_host_memory(engine.kv_host_memory, layout.num_pools, place.host_free_bytes)
    if engine.offload == "layer" and layout.streams_per_block < LEAST_STREAMS_PER_BLOCK:
        raise JobError(
            f"engine.offload is layer and one of {layout.num_stages} stages has {min(map(len, layout.layers))} layers; "
            "two stream at a time, so only with four is room saved: lower engine.num_stages, or take offload batch"
        )
    device_blocks, host_blocks = kv_blocks(engine, info, layout, stages, with_host=True)
    max_sequences = max_batch_sequences(engine, layout)
    most_running = (layout.num_stages + 1) * max_sequences
    if num_sequences is not None:
        most_running = min(most_running, -(-num_sequences // layout.num_replicas))
    step_seconds = None
    links = cost.kv_links if cost is not None else ()
    slowest = min(links, key=lambda link: link.load_bytes_per_second / link.kv_bytes_per_token, default=None)
    if cost is not None:
        context_tokens = device_blocks * place.block_tokens // layout.num_stages
        work = StepWork.decode(min(max_sequences, context_tokens), context_tokens)
        step_seconds = max(cost.stage_seconds(stage, work) for stage in range(layout.num_stages))
    return choose_offload(
        engine.offload,
        num_stages=layout.num_stages,
        device_blocks=device_blocks,
        host_blocks=host_blocks,
        needed_blocks=most_running * -(-info.max_context_tokens // place.block_tokens),
        step_seconds=step_seconds,
        link_bytes_per_second=slowest.load_bytes_per_second if slowest is not None else None,
        block_bytes=slowest.block_bytes(place.block_tokens) if slowest is not None else 1,
        streams_per_block=layout.streams_per_block,
    )


def this_place(engine: EngineSpec, info: ModelInfo) -> Place:
    """Raises JobError where the engine does not fit the machine."""
    device = resolve_device(engine)
    layout = resolve_layout(engine, info, device)
    backend = choose_backend(engine.attention, torch.device(device), getattr(torch, info.dtype), info.head_dim)
    return Place(
        name=_device_name(layout),
        layout=layout,
        free_bytes=free_bytes("cpu" if device == "cpu" else "cuda:0"),
        host_free_bytes=free_bytes("cpu"),
        block_tokens=backend.default_block_tokens if engine.block_tokens == "auto" else engine.block_tokens,
    )


def this_machine(engine: EngineSpec, info: ModelInfo, model_name: str) -> Machine:
    """Times from a profile of this model on this device where there is one, else a roofline."""
    place = this_place(engine, info)
    geometry = ModelShape.of(info)
    profile = find_profile(model_name, place.name, info.dtype)
    if profile is not None:
        profile.check_fits("the kept profile", geometry, place.name, info.dtype)
        source = f"profile of {profile.measured_on}"
        cost: Callable[[Sequence[range]], CostModel] = partial(ProfileCost, profile)
    else:
        source = "estimate; `batchpipe profile` measures"
        device = _guess(place.layout.device, place.name, info.dtype)
        cost = partial(RooflineCost, Hardware(device, place.layout.num_stages, place.name), geometry)
    return Machine(**vars(place), source=source, cost=cost)


def other_machine(name: str, engine: EngineSpec, info: ModelInfo) -> Machine:
    """One or more GPUs of a hardware file, as in `4xl20`. Raises JobError where the file or the engine does not fit."""
    hardware = load_hardware(name)
    geometry = ModelShape.of(info)
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
        layout=Layout("cuda", stage_layers(info, num_stages), num_replicas),
        free_bytes=usable_bytes,
        host_free_bytes=None,
        block_tokens=GPU_BLOCK_TOKENS if engine.block_tokens == "auto" else engine.block_tokens,
        source=f"roofline of {hardware.origin}",
        cost=lambda layers: RooflineCost(hardware, geometry, layers),
    )


def run_cost(engine: EngineSpec, info: ModelInfo, model_name: str) -> OnlineCost | None:
    """What a run's scheduler takes step times from, corrected as it goes; None for one stage with one tier of KV, which
    asks for none, and for devices of which nothing is known: their steps are taken to be as long as their tokens are
    many.
    """
    layout = resolve_layout(engine, info, resolve_device(engine))
    if layout.num_stages == 1 and engine.kv_host_memory == 0:
        return None
    name = _device_name(layout)
    profile = find_profile(model_name, name, info.dtype)
    if profile is not None:
        return OnlineCost(ProfileCost(profile, layout.layers))
    known = _known_device(name) if layout.device == "cuda" else None
    if known is None:
        return None
    hardware = Hardware(known, layout.num_stages, name)
    return OnlineCost(RooflineCost(hardware, ModelShape.of(info), layout.layers))


def _device_name(layout: Layout) -> str:
    """Of a stage's device: a processor counts with the threads that a stage has of it."""
    threads = max(1, num_threads(len(os.sched_getaffinity(0))) // layout.num_pools)
    return device_name("cpu" if layout.device == "cpu" else "cuda:0", threads)


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
