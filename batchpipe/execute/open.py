"""From a job's engine section and a model to a running pipeline: stages, threads, KV blocks, capacity."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from batchpipe.errors import JobError
from batchpipe.execute.base import Pipeline
from batchpipe.execute.local import LocalPipeline
from batchpipe.execute.memory import StageMemory, num_kv_blocks
from batchpipe.execute.stage import StageSpec
from batchpipe.execute.workers import WorkerPipeline
from batchpipe.job.spec import EngineSpec
from batchpipe.model.describe import ModelInfo
from batchpipe.model.partition import split_layers
from batchpipe.types import Capacity

# Chosen by measurement, see docs/log.md: beyond these a step only gets longer, not more efficient.
AUTO_BATCH_SEQUENCES = {"cpu": 256, "cuda": 512}
AUTO_STEP_TOKENS = {"cpu": 1024, "cuda": 8192}

# A layer does more than the products its cost counts (attention, norms), and the head less: only tokens after which one
# is drawn pass it. Measured on chat prompts; this only moves the cut between stages.
LAYER_OVERHEAD = 1.3
HEAD_SHARE = 0.6


def open_pipeline(engine: EngineSpec, info: ModelInfo, *, trust_remote_code: bool = False) -> Pipeline:
    """Loads the model and allocates KV. Raises ModelError, MemoryLimitError or JobError before anything is lost."""
    device = resolve_device(engine)
    num_stages = resolve_num_stages(engine, device)
    specs = stage_specs(engine, info, device, num_stages, trust_remote_code)
    max_sequences = _auto(engine.max_batch_sequences, AUTO_BATCH_SEQUENCES[device])

    def capacity_of(stages: Sequence[StageMemory]) -> Capacity:
        num_useful_tokens = max_sequences * num_stages * info.max_context_tokens
        requested = None if engine.kv_device_memory == "auto" else engine.kv_device_memory
        return Capacity(
            num_blocks=num_kv_blocks(stages, requested, device, num_useful_tokens),
            block_tokens=stages[0].block_tokens,
            num_stages=num_stages,
            max_batches=num_stages,
            max_step_tokens=specs[0].max_step_tokens,
            max_batch_sequences=max_sequences,
        )

    if num_stages == 1:
        return LocalPipeline(specs, capacity_of)
    return WorkerPipeline(specs, capacity_of, "nccl" if device == "cuda" else "shared_memory")


def resolve_device(engine: EngineSpec) -> str:
    has_gpu = torch.cuda.is_available()
    if engine.device == "cuda" and not has_gpu:
        raise JobError("engine.device is cuda and torch sees no GPU here; use auto or cpu, or see `batchpipe doctor`")
    if engine.device == "auto":
        return "cuda" if has_gpu else "cpu"
    return engine.device


def resolve_num_stages(engine: EngineSpec, device: str) -> int:
    """auto: all GPUs in one pipeline; on the CPU one stage, whose products use all processors."""
    num_devices = torch.cuda.device_count() if device == "cuda" else None
    if engine.num_stages == "auto":
        return num_devices or 1
    if num_devices is not None and engine.num_stages > num_devices:
        raise JobError(
            f"engine.num_stages is {engine.num_stages} and there are {num_devices} GPUs; one stage needs one"
        )
    return engine.num_stages


def stage_specs(
    engine: EngineSpec, info: ModelInfo, device: str, num_stages: int, trust_remote_code: bool
) -> list[StageSpec]:
    cpus = sorted(os.sched_getaffinity(0))
    max_sequences = _auto(engine.max_batch_sequences, AUTO_BATCH_SEQUENCES[device])
    max_step_tokens = max(_auto(engine.max_step_tokens, AUTO_STEP_TOKENS[device]), max_sequences)
    specs = []
    layer_costs = [cost * LAYER_OVERHEAD for cost in info.layer_costs]
    for index, layers in enumerate(split_layers(layer_costs, info.head_cost * HEAD_SHARE, 0.0, num_stages)):
        own_cpus = cpus[index * len(cpus) // num_stages : (index + 1) * len(cpus) // num_stages]
        specs.append(
            StageSpec(
                index=index,
                num_stages=num_stages,
                first_layer=layers.start,
                end_layer=layers.stop,
                model_folder=str(info.folder),
                trust_remote_code=trust_remote_code,
                dtype=info.dtype,
                device="cpu" if device == "cpu" else f"cuda:{index}",
                attention=engine.attention,
                block_tokens=None if engine.block_tokens == "auto" else engine.block_tokens,
                num_threads=num_threads(len(own_cpus)),
                cpus=tuple(own_cpus) if num_stages > 1 and device == "cpu" else (),
                num_kv_heads=info.num_kv_heads,
                head_dim=info.head_dim,
                hidden_size=info.hidden_size,
                vocabulary_size=info.vocabulary_size,
                eos_token_ids=info.eos_token_ids,
                max_step_tokens=max_step_tokens,
            )
        )
    return specs


def num_threads(num_cpus: int) -> int:
    """A thread a processor, or what OMP_NUM_THREADS says, as for every program that uses OpenMP."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else max(1, num_cpus)


def _auto(value: int | str, chosen: int) -> int:
    return chosen if isinstance(value, str) else value
