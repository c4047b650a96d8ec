"""The machine a job is placed on: this one, as it is found, or one that a hardware file describes."""

from __future__ import annotations

import os
from dataclasses import dataclass

from batchpipe.attention.block_tokens import BLOCK_TOKENS, default_block_tokens
from batchpipe.cost.hardware import Hardware, load_hardware
from batchpipe.job.spec import EngineSpec
from batchpipe.model.describe import ModelInfo
from batchpipe.pipeline.device_names import device_name
from batchpipe.pipeline.memory import free_bytes
from batchpipe.placement.devices import num_threads, resolve_device


@dataclass(frozen=True, slots=True)
class Machine:
    """Devices of one kind, with the memory that was free when they were looked at: once, before weights are loaded.

    num_gpus: None on the CPU, where all stages share the processors and one memory. free_bytes: of one device.
    host_free_bytes: None where it is not known. hardware: the file that describes it; None for this machine.
    """

    name: str
    num_gpus: int | None
    free_bytes: int
    host_free_bytes: int | None
    hardware: Hardware | None = None

    def stage_device_name(self, num_pools: int) -> str:
        """The device of one of `num_pools` stages: a GPU, or the processor and the stage's share of its threads."""
        if self.num_gpus is not None:
            return self.name
        return device_name("cpu", max(1, num_threads(len(os.sched_getaffinity(0))) // num_pools))

    def block_tokens(self, engine: EngineSpec, info: ModelInfo) -> int:
        """`engine.block_tokens`, or what the attention backend of this machine is fastest with."""
        if engine.block_tokens != "auto":
            return engine.block_tokens
        if self.hardware is not None:
            return BLOCK_TOKENS
        device = "cpu" if self.num_gpus is None else "cuda"
        return default_block_tokens(engine.attention, device, info.dtype, info.head_dim)


def this_machine(engine: EngineSpec) -> Machine:
    """Raises JobError where `engine.device` is not here."""
    host_free_bytes = free_bytes("cpu")
    if resolve_device(engine) == "cpu":
        return Machine("this machine", None, host_free_bytes, host_free_bytes)
    import torch

    gpu = "cuda:0"
    return Machine(torch.cuda.get_device_name(gpu), torch.cuda.device_count(), free_bytes(gpu), host_free_bytes)


def described_machine(name: str) -> Machine:
    """GPUs of a hardware file, as in `4xl20`. Raises JobError where there is no such file."""
    hardware = load_hardware(name)
    label = f"{hardware.num_devices} x {hardware.device.name}"
    return Machine(label, hardware.num_devices, int(hardware.device.memory_bytes), None, hardware)
