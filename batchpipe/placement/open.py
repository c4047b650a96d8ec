"""From a job's engine section and a model to running pipelines: devices, stages, copies, threads."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from batchpipe.errors import JobError
from batchpipe.job.spec import EngineSpec
from batchpipe.model.describe import ModelInfo
from batchpipe.model.partition import split_layers
from batchpipe.pipeline.base import Pipeline
from batchpipe.pipeline.local import LocalPipeline
from batchpipe.pipeline.memory import StageMemory, free_bytes
from batchpipe.pipeline.multiprocess import MultiprocessPipeline
from batchpipe.pipeline.stage import StageSpec
from batchpipe.pipeline.swap.copy_engine import EmulatedLink
from batchpipe.pipeline.worker import Transport
from batchpipe.placement.capacity import Layout, max_step_tokens, offered_capacity
from batchpipe.types import Capacity

# A layer does more than the products its cost counts (attention, norms), and the head less: only tokens after which one
# is drawn pass it. Measured on chat prompts; this only moves the cut between stages.
LAYER_OVERHEAD = 1.3
HEAD_SHARE = 0.6


def open_pipelines(
    engine: EngineSpec, info: ModelInfo, offload: str = "none", *, link: EmulatedLink | None = None
) -> list[Pipeline]:
    """Loads the model into every replica, side by side, and allocates KV.

    offload: as in `Capacity`, decided beforehand. link: between the tiers of KV, in place of the machine's own.
    Raises ModelError, MemoryLimitError or JobError; nothing stays open then.
    """
    layout = resolve_layout(engine, info, resolve_device(engine))

    def capacity_of(stages: Sequence[StageMemory]) -> Capacity:
        return offered_capacity(engine, info, layout, stages, offload)

    if layout.num_pools == 1:
        return [LocalPipeline(stage_specs(engine, info, layout.device, 1, link=link), capacity_of)]
    transport: Transport = "nccl" if layout.device == "cuda" else "shared_memory"
    replicas = [
        stage_specs(engine, info, layout.device, layout.num_stages, replica, layout.num_replicas, link)
        for replica in range(layout.num_replicas)
    ]
    return list(MultiprocessPipeline.open(replicas, capacity_of, transport))


def resolve_layout(engine: EngineSpec, info: ModelInfo, device: str) -> Layout:
    """On this machine. Raises JobError where it has too few GPUs."""
    num_stages = resolve_num_stages(engine, info, device)
    return Layout(device, stage_layers(info, num_stages), resolve_num_replicas(engine, device, num_stages))


def resolve_device(engine: EngineSpec) -> str:
    has_gpu = torch.cuda.is_available()
    if engine.device == "cuda" and not has_gpu:
        raise JobError("engine.device is cuda and torch sees no GPU here; use auto or cpu, or see `batchpipe doctor`")
    if engine.device == "auto":
        return "cuda" if has_gpu else "cpu"
    return engine.device


def resolve_num_stages(engine: EngineSpec, info: ModelInfo, device: str) -> int:
    """auto: on GPUs as few stages as hold the weights and as much KV again, so that copies take the other GPUs."""
    num_devices = torch.cuda.device_count() if device == "cuda" else None
    if engine.num_stages == "auto":
        if num_devices is None:
            return 1
        return fewest_stages(info.weight_bytes, free_bytes("cuda:0"), num_devices)
    if num_devices is not None and engine.num_stages > num_devices:
        raise JobError(
            f"engine.num_stages is {engine.num_stages} and there are {num_devices} GPUs; one stage needs one"
        )
    return engine.num_stages


def fewest_stages(weight_bytes: int, free_device_bytes: int, num_devices: int) -> int:
    """The smallest divisor of the number of GPUs whose stages keep half of their memory for KV; else all of them."""
    for num_stages in range(1, num_devices):
        if num_devices % num_stages == 0 and 2 * weight_bytes <= num_stages * free_device_bytes:
            return num_stages
    return num_devices


def resolve_num_replicas(engine: EngineSpec, device: str, num_stages: int) -> int:
    """auto: as many copies as the GPUs hold; one on the CPU, where copies read all weights once more for fewer rows."""
    if device == "cpu":
        return 1 if engine.replicas == "auto" else engine.replicas
    num_devices = torch.cuda.device_count()
    if engine.replicas == "auto":
        return num_devices // num_stages
    if engine.replicas * num_stages > num_devices:
        raise JobError(
            f"engine.replicas is {engine.replicas} of {num_stages} stages each and there are {num_devices} GPUs; "
            "a stage needs one of its own"
        )
    return engine.replicas


def stage_specs(
    engine: EngineSpec,
    info: ModelInfo,
    device: str,
    num_stages: int,
    replica: int = 0,
    num_replicas: int = 1,
    link: EmulatedLink | None = None,
) -> list[StageSpec]:
    """The stages of one replica, on its share of the processors or GPUs; link: see `open_pipelines`."""
    layout = Layout(device, stage_layers(info, num_stages), num_replicas)
    all_cpus = sorted(os.sched_getaffinity(0))
    cpus = all_cpus[replica * len(all_cpus) // num_replicas : (replica + 1) * len(all_cpus) // num_replicas]
    specs = []
    for index, layers in enumerate(layout.layers):
        own_cpus = cpus[index * len(cpus) // num_stages : (index + 1) * len(cpus) // num_stages]
        specs.append(
            StageSpec(
                index=index,
                num_stages=num_stages,
                first_layer=layers.start,
                end_layer=layers.stop,
                model_folder=str(info.folder),
                trust_remote_code=info.trust_remote_code,
                dtype=info.dtype,
                device="cpu" if device == "cpu" else f"cuda:{replica * num_stages + index}",
                attention=engine.attention,
                block_tokens=None if engine.block_tokens == "auto" else engine.block_tokens,
                num_threads=max(1, min(len(own_cpus), num_threads(len(all_cpus)))),
                cpus=tuple(own_cpus) if layout.num_pools > 1 and device == "cpu" else (),
                num_kv_heads=info.num_kv_heads,
                head_dim=info.head_dim,
                hidden_size=info.hidden_size,
                vocabulary_size=info.vocabulary_size,
                eos_token_ids=info.eos_token_ids,
                max_step_tokens=max_step_tokens(engine, layout),
                kv_verify=engine.kv_verify,
                link=link,
            )
        )
    return specs


def stage_layers(info: ModelInfo, num_stages: int) -> list[range]:
    """The layers of each stage, so that the slowest is as fast as can be."""
    layer_costs = [cost * LAYER_OVERHEAD for cost in info.layer_costs]
    return split_layers(layer_costs, info.head_cost * HEAD_SHARE, 0.0, num_stages)


def num_threads(num_cpus: int) -> int:
    """A thread a processor, or what OMP_NUM_THREADS says, as for every program that uses OpenMP."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else max(1, num_cpus)
