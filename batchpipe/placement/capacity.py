"""What one model copy offers its scheduler: KV blocks of both tiers, circulating batches, the size of steps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from batchpipe.errors import MemoryLimitError
from batchpipe.job.spec import EngineSpec
from batchpipe.model.describe import ModelInfo
from batchpipe.pipeline.memory import NUM_STAGING_BUFFERS, StageMemory, check_host_memory, gib, num_kv_blocks
from batchpipe.types import Capacity

logger = logging.getLogger(__name__)

# Chosen by measurement, see docs/log.md: beyond these a step only gets longer, not more efficient. On the CPU the
# sequences are those of all replicas together.
CPU_SEQUENCES = 256
CUDA_BATCH_SEQUENCES = 512
AUTO_STEP_TOKENS = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True, slots=True)
class Layout:
    """How copies of a model stand on a machine: `layers` of each stage of a copy, on the CPU or on GPUs."""

    device: str  # cpu or cuda
    layers: Sequence[range]
    num_replicas: int

    @property
    def num_stages(self) -> int:
        return len(self.layers)

    @property
    def num_pools(self) -> int:
        """Stages of all copies: so many pools of KV stand in host memory."""
        return self.num_stages * self.num_replicas

    @property
    def streams_per_block(self) -> int:
        """As in `Capacity`: a block's room holds two layers at a time of each block that passes through."""
        return min(map(len, self.layers)) // 2


def offered_capacity(
    engine: EngineSpec, info: ModelInfo, layout: Layout, stages: Sequence[StageMemory], offload: str = "none"
) -> Capacity:
    """What one replica offers, from what its stages have free once weights are loaded.

    offload: as in `Capacity`, decided beforehand; where `engine.offload` leaves it open and the host turns out to hold
    less than the device, there is one tier, and a warning. Raises MemoryLimitError.
    """
    max_sequences = max_batch_sequences(engine, layout)
    # Loads of the next batch run beside the batch that computes, so one more batch has to be known.
    max_batches = layout.num_stages + (offload in ("batch", "both"))
    num_blocks, num_host_blocks = kv_blocks(engine, info, layout, stages, with_host=offload != "none")
    if engine.offload == "auto" and offload != "none" and num_host_blocks <= num_blocks:
        logger.warning(
            "KV stays on the device: engine.kv_host_memory holds %d blocks, the device %d", num_host_blocks, num_blocks
        )
        return offered_capacity(engine, info, layout, stages)
    return Capacity(
        num_blocks=num_blocks,
        block_tokens=stages[0].block_tokens,
        num_stages=layout.num_stages,
        max_batches=max_batches,
        max_step_tokens=max_step_tokens(engine, layout),
        max_batch_sequences=max_sequences,
        num_host_blocks=num_host_blocks,
        streams_per_block=layout.streams_per_block if num_host_blocks else 0,
        offload=offload,
    )


def kv_blocks(
    engine: EngineSpec, info: ModelInfo, layout: Layout, stages: Sequence[StageMemory], *, with_host: bool
) -> tuple[int, int]:
    """Blocks that every stage holds on its device, and in host memory (0 without); the same numbers on each.

    Raises MemoryLimitError where more is asked for than there is, or where `engine.offload` asks for host memory that
    holds less than the device.
    """
    host_bytes = engine.kv_host_memory if with_host else 0
    if with_host and layout.device == "cuda":
        # What a step computes waits in a buffer on the device until the host has it.
        staged_tokens = NUM_STAGING_BUFFERS * max_step_tokens(engine, layout)
        stages = [
            replace(s, free_bytes=max(0, s.free_bytes - staged_tokens * s.bytes_per_block // s.block_tokens))
            for s in stages
        ]
    # Stages on the CPU share one memory, and their second tier stands in it too; every GPU has its own.
    num_sharers = layout.num_pools if layout.device == "cpu" else 1
    requested = None if engine.kv_device_memory == "auto" else engine.kv_device_memory
    free_bytes = min(stage.free_bytes for stage in stages) - num_sharers * (requested or 0)
    if layout.device == "cpu" and host_bytes and free_bytes >= 0:
        check_host_memory(host_bytes, num_sharers, free_bytes)
        stages = [replace(stage, free_bytes=stage.free_bytes - num_sharers * host_bytes) for stage in stages]
    num_useful_tokens = max_batch_sequences(engine, layout) * layout.num_stages * info.max_context_tokens
    num_blocks = num_kv_blocks(stages, requested, layout.device, num_useful_tokens, num_sharers)
    largest_bytes = max(stage.bytes_per_block for stage in stages)
    num_host_blocks = host_bytes // largest_bytes
    if with_host and engine.offload != "auto" and num_host_blocks < num_blocks:
        raise MemoryLimitError(
            f"engine.offload is {engine.offload}; engine.kv_host_memory holds {num_host_blocks} blocks of KV and the "
            f"device {num_blocks}, and host memory keeps a copy of all KV: raise engine.kv_host_memory to more than "
            f"{gib(num_blocks * largest_bytes)}, or lower engine.kv_device_memory below {gib(host_bytes)}"
        )
    return num_blocks, num_host_blocks


def max_batch_sequences(engine: EngineSpec, layout: Layout) -> int:
    if engine.max_batch_sequences != "auto":
        return engine.max_batch_sequences
    return max(1, CPU_SEQUENCES // layout.num_replicas) if layout.device == "cpu" else CUDA_BATCH_SEQUENCES


def max_step_tokens(engine: EngineSpec, layout: Layout) -> int:
    asked = AUTO_STEP_TOKENS[layout.device] if engine.max_step_tokens == "auto" else engine.max_step_tokens
    return max(asked, max_batch_sequences(engine, layout))
