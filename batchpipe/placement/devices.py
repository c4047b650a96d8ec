"""The devices of this machine that a job may use: GPUs, or the processors and their threads."""

from __future__ import annotations

import ctypes
import os

from batchpipe.errors import JobError
from batchpipe.job.spec import EngineSpec


def resolve_device(engine: EngineSpec) -> str:
    """`cpu` or `cuda`. Raises JobError where a GPU is asked for and there is none."""
    has_gpu = has_cuda_driver() and _torch_sees_gpu()
    if engine.device == "cuda" and not has_gpu:
        raise JobError("engine.device is cuda and torch sees no GPU here; use auto or cpu, or see `batchpipe doctor`")
    if engine.device == "auto":
        return "cuda" if has_gpu else "cpu"
    return engine.device


def has_cuda_driver() -> bool:
    """Whether the driver's library is here: without it torch sees no GPU, and need not be imported to say so."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _torch_sees_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def num_threads(num_cpus: int) -> int:
    """One thread per processor, or OMP_NUM_THREADS, which every program that uses OpenMP obeys."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else max(1, num_cpus)


def cpus_of(index: int, num_shares: int, cpus: list[int]) -> list[int]:
    """Share `index` of `num_shares` even, contiguous shares of these processors."""
    return cpus[index * len(cpus) // num_shares : (index + 1) * len(cpus) // num_shares]
