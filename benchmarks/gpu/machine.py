"""What the machine is: versions, the GPU, the rates that bound all else; and whether the program is whole here."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pkgutil
import subprocess
import sys
from typing import Any

import torch

import batchpipe
from benchmarks.gpu.case import Case

_PACKAGES = ("torch", "transformers", "triton", "numpy", "pyarrow")
_NVIDIA_FIELDS = (
    "name,driver_version,memory.total,pcie.link.gen.max,pcie.link.gen.current,pcie.link.width.current,power.limit"
)
_NUM_LAUNCHES = 1000


def env(case: Case) -> None:
    """Versions, the device, and its ceilings: memory, products, the link to the host, launches."""
    versions = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    case.say("versions", versions=versions, processors=len(os.sched_getaffinity(0)))
    if case.device == "cuda":
        command = ["nvidia-smi", f"--query-gpu={_NVIDIA_FIELDS}", "--format=csv"]
        case.attempt("nvidia-smi", lambda: {"lines": subprocess.check_output(command, text=True).splitlines()})
        case.attempt("gpu", _gpu)
    case.attempt("ceilings", lambda: ceilings(case))


def _gpu() -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(0)
    free_bytes, total_bytes = torch.cuda.mem_get_info(0)
    return {
        "name": gpu.name,
        "number": torch.cuda.device_count(),
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "free_bytes": free_bytes,
        "total_bytes": total_bytes,
        "nccl": str(torch.cuda.nccl.version()),
    }


def ceilings(case: Case) -> dict[str, float]:
    """Bytes and operations per second, and the seconds of one launch; on a CPU, of it and its memory."""
    device = case.torch_device
    num_bytes, size = (1 << 24, 256) if case.tiny else (1 << 30, 8192)
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_seconds = case.median_seconds(lambda: target.copy_(source))
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product_seconds = case.median_seconds(lambda: left @ right)
    host = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=case.device == "cuda")
    up_seconds = case.median_seconds(lambda: target.copy_(host, non_blocking=True))
    down_seconds = case.median_seconds(lambda: host.copy_(target, non_blocking=True))
    small = torch.zeros(16, device=device)

    def launches() -> None:
        for _ in range(_NUM_LAUNCHES):
            small.add_(1)

    return {
        "copy_bytes_per_second": 2 * num_bytes / copy_seconds,  # read and written
        "bf16_flops_per_second": 2 * size**3 / product_seconds,
        "host_to_device_bytes_per_second": num_bytes / up_seconds,
        "device_to_host_bytes_per_second": num_bytes / down_seconds,
        "launch_seconds": case.median_seconds(launches, 3) / _NUM_LAUNCHES,
    }


def imports(case: Case) -> None:
    """Every module imports, and `batchpipe doctor` says what is missing."""
    names = [module.name for module in pkgutil.walk_packages(batchpipe.__path__, "batchpipe.")]
    failed = {}
    for name in names:
        if name.endswith("__main__"):
            continue
        try:
            importlib.import_module(name)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    case.say("modules", wrong=bool(failed), number=len(names), failed=failed)
    command = [sys.executable, "-m", "batchpipe", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True)
    case.say("doctor", wrong=done.returncode != 0, lines=done.stderr.splitlines())
