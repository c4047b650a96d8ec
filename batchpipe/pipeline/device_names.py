"""What devices are called in metrics, profiles and messages."""

from __future__ import annotations

import platform
from pathlib import Path


def device_name(device: str, num_threads: int) -> str:
    """The GPU's name, or the processor's and the threads it computes with."""
    if device == "cpu":
        return f"{processor_name()}, {num_threads} threads"
    import torch

    return torch.cuda.get_device_name(device)


def processor_name() -> str:
    """The name that the system has for the processor, else its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    named = next((line for line in lines if line.startswith("model name")), "")
    return named.partition(":")[2].strip() or f"{platform.machine()} CPU"
