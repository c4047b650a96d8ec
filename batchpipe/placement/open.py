"""From a placement to running pipelines, one per replica."""

from __future__ import annotations

import os
from importlib.util import find_spec

from batchpipe.job.spec import EngineSpec
from batchpipe.kv.layout import KvLayout
from batchpipe.model.describe import ModelInfo
from batchpipe.pipeline.base import Pipeline
from batchpipe.pipeline.local import LocalPipeline
from batchpipe.pipeline.multiprocess import MultiprocessPipeline
from batchpipe.pipeline.stage import StageSpec
from batchpipe.pipeline.swap.copy_engine import EmulatedLink
from batchpipe.pipeline.worker import Transport
from batchpipe.placement.capacity import max_batch_sequences, max_step_tokens
from batchpipe.placement.devices import cpus_of, num_threads
from batchpipe.placement.placement import Placement
from batchpipe.placement.stage_split import StageSplit


def open_pipelines(placement: Placement, *, link: EmulatedLink | None = None) -> list[Pipeline]:
    """Loads the model into every replica, side by side, and allocates KV.

    link: between the tiers of KV, in place of the machine's own.
    Raises ModelError or MemoryLimitError; nothing stays open then.
    """
    split = placement.split
    replicas = [
        stage_specs(placement.engine, placement.info, split, placement.block_tokens, replica, link)
        for replica in range(split.num_replicas)
    ]
    if split.num_pools == 1:
        [specs] = replicas
        return [_on_one_device(specs, placement, is_gpu=split.device == "cuda")]
    transport: Transport = "nccl" if split.device == "cuda" else "shared_memory"
    return list(MultiprocessPipeline.open(replicas, placement.capacity_of, transport))


def _on_one_device(specs: list[StageSpec], placement: Placement, *, is_gpu: bool) -> Pipeline:
    # Its kernels need Triton, which comes with torch for GPUs.
    if not is_gpu or placement.engine.attention == "reference" or find_spec("triton") is None:
        return LocalPipeline(specs, placement.capacity_of)
    from batchpipe.pipeline.gpu import GpuPipeline

    return GpuPipeline(specs[0], placement.capacity_of)


def stage_specs(
    engine: EngineSpec,
    info: ModelInfo,
    split: StageSplit,
    block_tokens: int,
    replica: int = 0,
    link: EmulatedLink | None = None,
) -> list[StageSpec]:
    """The stages of one replica, on its share of the processors or GPUs; link: see `open_pipelines`."""
    num_stages, on_cpu = split.num_stages, split.device == "cpu"
    all_cpus = sorted(os.sched_getaffinity(0))
    cpus = cpus_of(replica, split.num_replicas, all_cpus)
    specs = []
    for index, layers in enumerate(split.layers):
        own_cpus = cpus_of(index, num_stages, cpus)
        specs.append(
            StageSpec(
                index=index,
                num_stages=num_stages,
                first_layer=layers.start,
                end_layer=layers.stop,
                model_folder=str(info.folder),
                trust_remote_code=info.trust_remote_code,
                dtype=info.dtype,
                device="cpu" if on_cpu else f"cuda:{replica * num_stages + index}",
                attention=engine.attention,
                num_threads=max(1, min(len(own_cpus), num_threads(len(all_cpus)))),
                cpus=tuple(own_cpus) if split.num_pools > 1 and on_cpu else (),
                kv=KvLayout.of(info, block_tokens),
                hidden_size=info.hidden_size,
                vocabulary_size=info.vocabulary_size,
                eos_token_ids=info.eos_token_ids,
                max_step_tokens=max_step_tokens(engine, split),
                max_batch_sequences=max_batch_sequences(engine, split),
                kv_verify=engine.kv_verify,
                link=link,
            )
        )
    return specs
