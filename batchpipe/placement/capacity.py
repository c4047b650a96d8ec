"""What one model copy offers its scheduler: KV blocks of both tiers, in-flight micro-batches, the size of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from batchpipe.job.spec import EngineSpec
from batchpipe.model.describe import ModelInfo
from batchpipe.pipeline.memory import NUM_STAGING_BUFFERS, StageMemory
from batchpipe.placement.memory import check_host_memory, num_kv_blocks
from batchpipe.placement.offload_mode import OffloadMode
from batchpipe.placement.stage_split import StageSplit
from batchpipe.types import Capacity

# Chosen by measurement, see docs/log.md: beyond these a step only gets longer, not more efficient. On the CPU the
# sequences are those of all replicas together.
CPU_SEQUENCES = 256
CUDA_BATCH_SEQUENCES = 512
AUTO_STEP_TOKENS = {"cpu": 1024, "cuda": 8192}


def offered_capacity(
    engine: EngineSpec,
    info: ModelInfo,
    split: StageSplit,
    stages: Sequence[StageMemory],
    offload: OffloadMode,
    useful_blocks: int | None = None,
) -> Capacity:
    """What one replica offers, from what its stages have free beside their weights. Raises MemoryLimitError.

    useful_blocks: as many as the job can have in use; None: not known.
    With two tiers the host keeps a copy of all KV, so the device gets no more blocks than the host.
    """
    num_blocks, num_host_blocks = kv_blocks(
        engine, info, split, stages, with_host=offload != "none", useful_blocks=useful_blocks
    )
    if offload != "none":
        num_blocks = min(num_blocks, num_host_blocks)
    return Capacity(
        num_blocks=num_blocks,
        block_tokens=stages[0].block_tokens,
        num_stages=split.num_stages,
        # Whole blocks are prefetched for the next batch while this one computes, so one more batch has to be known.
        max_batches=split.num_stages + (offload == "batch"),
        max_step_tokens=max_step_tokens(engine, split),
        max_batch_sequences=max_batch_sequences(engine, split),
        num_host_blocks=num_host_blocks,
        streams_per_block=split.streams_per_block if num_host_blocks else 0,
        offload=offload,
    )


def kv_blocks(
    engine: EngineSpec,
    info: ModelInfo,
    split: StageSplit,
    stages: Sequence[StageMemory],
    *,
    with_host: bool,
    host_free_bytes: int | None = None,
    useful_blocks: int | None = None,
) -> tuple[int, int]:
    """Blocks that every stage holds on its device, and in host memory (0 without); the same numbers on each.

    host_free_bytes: where the devices are GPUs; None where it is not known.
    Raises MemoryLimitError where more is asked for than there is.
    """
    host_bytes = engine.kv_host_memory if with_host else 0
    on_cpu = split.device == "cpu"
    # Stages on the CPU share one memory, and their second tier stands in it too; every GPU has its own.
    num_sharers = split.num_pools if on_cpu else 1
    requested = None if engine.kv_device_memory == "auto" else engine.kv_device_memory
    taken_bytes = [0] * len(stages)
    if host_bytes and on_cpu:
        free_bytes = min(stage.free_bytes for stage in stages) - num_sharers * (requested or 0)
        if free_bytes >= 0:  # else the device's KV alone is too much, which `num_kv_blocks` says
            check_host_memory(host_bytes, num_sharers, free_bytes)
            taken_bytes = [num_sharers * host_bytes] * len(stages)
    elif host_bytes:
        if host_free_bytes is not None:
            check_host_memory(host_bytes, split.num_pools, host_free_bytes)
        # What a step computes waits in a buffer on the device until the host has it.
        staged_tokens = NUM_STAGING_BUFFERS * max_step_tokens(engine, split)
        taken_bytes = [staged_tokens * stage.bytes_per_block // stage.block_tokens for stage in stages]
    longest_blocks = -(-info.max_context_tokens // stages[0].block_tokens)
    most_blocks = max_batch_sequences(engine, split) * split.num_stages * longest_blocks
    if useful_blocks is not None:
        most_blocks = max(1, min(most_blocks, useful_blocks))
    stages = [
        replace(stage, free_bytes=max(0, stage.free_bytes - taken))
        for stage, taken in zip(stages, taken_bytes, strict=True)
    ]
    num_blocks = num_kv_blocks(stages, requested, split.device, most_blocks, num_sharers)
    return num_blocks, host_bytes // max(stage.bytes_per_block for stage in stages)


def max_batch_sequences(engine: EngineSpec, split: StageSplit) -> int:
    """Sequences that one step may hold."""
    if engine.max_batch_sequences != "auto":
        return engine.max_batch_sequences
    return max(1, CPU_SEQUENCES // split.num_replicas) if split.device == "cpu" else CUDA_BATCH_SEQUENCES


def max_step_tokens(engine: EngineSpec, split: StageSplit) -> int:
    """New tokens that one step may hold; at least one per sequence."""
    asked = AUTO_STEP_TOKENS[split.device] if engine.max_step_tokens == "auto" else engine.max_step_tokens
    return max(asked, max_batch_sequences(engine, split))
