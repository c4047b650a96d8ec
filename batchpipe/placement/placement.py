"""Where and how a job's model runs: resolved once, before anything is loaded, and handed to all that need it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from batchpipe.cost.model import StepWork
from batchpipe.errors import JobError, MemoryLimitError
from batchpipe.job.spec import EngineSpec
from batchpipe.kv.layout import STAGED_LAYERS, saves_room
from batchpipe.model.describe import ModelInfo
from batchpipe.pipeline.memory import StageMemory
from batchpipe.placement.capacity import kv_blocks, max_batch_sequences, offered_capacity
from batchpipe.placement.machine import Machine, described_machine
from batchpipe.placement.memory import gib, memory_beside_weights
from batchpipe.placement.offload_mode import OffloadChoice, choose_offload
from batchpipe.placement.stage_split import StageSplit, split_stages, stage_weight_bytes
from batchpipe.placement.step_cost import StepCost, known_cost
from batchpipe.types import Capacity

JobBlocks = Callable[[int], int | None]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A model on a machine, as `engine` asks for it.

    stages: what each stage has free beside its weights, by what was free before they were loaded.
    cost: step times of the stages; None where nothing is known of the device, or where nothing asks for them.
    num_sequences: of the whole job; None where they are not counted.
    job_blocks: called once the weights are loaded, with the tokens of a block: the blocks of all sequences of the job
    together, if all its rows have been read by then, else None.
    capacity: what one replica offers, by `stages`, of a job of which no row has been read.
    """

    machine: Machine
    engine: EngineSpec
    info: ModelInfo
    split: StageSplit
    stages: tuple[StageMemory, ...]
    offload: OffloadChoice
    cost: StepCost | None
    num_sequences: int | None = None
    job_blocks: JobBlocks | None = None
    capacity: Capacity = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "capacity", self._capacity(self.stages, self._counted_blocks()))

    def capacity_of(self, stages: Sequence[StageMemory]) -> Capacity:
        """What one replica offers where its stages report this once they are loaded. Raises MemoryLimitError."""
        found = None if self.job_blocks is None else self.job_blocks(stages[0].block_tokens)
        return self._capacity(stages, self._counted_blocks() if found is None else found)

    def _capacity(self, stages: Sequence[StageMemory], useful_blocks: int | None) -> Capacity:
        return offered_capacity(self.engine, self.info, self.split, stages, self.offload.mode, useful_blocks)

    def _counted_blocks(self) -> int | None:
        """Of all sequences, each as long as the model's context."""
        if self.num_sequences is None:
            return None
        return self.num_sequences * -(-self.info.max_context_tokens // self.stages[0].block_tokens)

    @property
    def device_name(self) -> str:
        return self.machine.stage_device_name(self.split.num_pools)

    @property
    def block_tokens(self) -> int:
        return self.capacity.block_tokens

    @property
    def weight_bytes_per_stage(self) -> tuple[int, ...]:
        return stage_weight_bytes(self.info, self.split.layers)

    @property
    def kv_bytes_per_stage(self) -> tuple[int, ...]:
        return tuple(self.capacity.num_blocks * stage.bytes_per_block for stage in self.stages)

    @property
    def kv_host_bytes_per_stage(self) -> tuple[int, ...]:
        return tuple(self.capacity.num_host_blocks * stage.bytes_per_block for stage in self.stages)


def place_on(hardware_name: str, engine: EngineSpec, info: ModelInfo, num_sequences: int | None = None) -> Placement:
    """On the GPUs of a hardware file, as in `8xrtx5090`; see `place`."""
    return place(described_machine(hardware_name), engine, info, num_sequences)


def place(
    machine: Machine,
    engine: EngineSpec,
    info: ModelInfo,
    num_sequences: int | None = None,
    job_blocks: JobBlocks | None = None,
) -> Placement:
    """Decides all that a run decides before it loads the model, so that what cannot be is said by then.

    num_sequences, job_blocks: see `Placement`.
    Raises JobError where the machine does not fit the engine section, and MemoryLimitError.
    """
    split = split_stages(machine, engine, info)
    stages = memory_beside_weights(machine, split, info, machine.block_tokens(engine, info))
    # One stage with one tier of KV asks for no step times.
    asks_for_times = split.num_stages > 1 or engine.kv_host_memory > 0 or machine.hardware is not None
    cost = known_cost(machine, split, info) if asks_for_times else None
    offload = _offload(machine, engine, info, split, stages, cost, num_sequences)
    return Placement(
        machine=machine,
        engine=engine,
        info=info,
        split=split,
        stages=stages,
        offload=offload,
        cost=cost,
        num_sequences=num_sequences,
        job_blocks=job_blocks,
    )


def _offload(
    machine: Machine,
    engine: EngineSpec,
    info: ModelInfo,
    split: StageSplit,
    stages: Sequence[StageMemory],
    cost: StepCost | None,
    num_sequences: int | None,
) -> OffloadChoice:
    """`choose_offload` with what it must know. Raises JobError, and MemoryLimitError."""
    if engine.offload == "none" or engine.kv_host_memory == 0:
        key = "offload is none" if engine.kv_host_memory else "kv_host_memory is 0"
        return OffloadChoice("none", f"engine.{key}")
    if engine.offload == "layer" and not saves_room(split.streams_per_block):
        raise JobError(
            f"engine.offload is layer and one of {split.num_stages} stages has {min(map(len, split.layers))} layers; "
            f"{STAGED_LAYERS} of them are on the device at a time, so only with {2 * STAGED_LAYERS} is room saved: "
            "lower engine.num_stages, or take offload batch"
        )
    device_blocks, host_blocks = kv_blocks(
        engine, info, split, stages, with_host=True, host_free_bytes=machine.host_free_bytes
    )
    if engine.offload != "auto" and host_blocks < device_blocks:
        largest_bytes = max(stage.bytes_per_block for stage in stages)
        raise MemoryLimitError(
            f"engine.offload is {engine.offload}; engine.kv_host_memory holds {host_blocks} blocks of KV and the "
            f"device {device_blocks}, and host memory keeps a copy of all KV: raise engine.kv_host_memory to more than "
            f"{gib(device_blocks * largest_bytes)}, or lower engine.kv_device_memory below {gib(engine.kv_host_memory)}"
        )
    block_tokens = stages[0].block_tokens
    max_sequences = max_batch_sequences(engine, split)
    most_running = (split.num_stages + 1) * max_sequences
    if num_sequences is not None:
        most_running = min(most_running, -(-num_sequences // split.num_replicas))
    step_seconds = slowest = None
    if cost is not None:
        context_tokens = device_blocks * block_tokens // split.num_stages
        work = StepWork.decode(min(max_sequences, context_tokens), context_tokens)
        step_seconds = max(cost.model.stage_seconds(stage, work) for stage in range(split.num_stages))
        rates = ((link.load_bytes_per_second, link.block_bytes(block_tokens)) for link in cost.model.kv_links)
        slowest = min(rates, key=lambda link: link[0] / link[1], default=None)
    return choose_offload(
        engine.offload,
        num_stages=split.num_stages,
        device_blocks=device_blocks,
        host_blocks=host_blocks,
        needed_blocks=most_running * -(-info.max_context_tokens // block_tokens),
        step_seconds=step_seconds,
        link_bytes_per_second=slowest[0] if slowest else None,
        block_bytes=slowest[1] if slowest else 1,
        streams_per_block=split.streams_per_block,
        on_gpu=split.device == "cuda",
    )
