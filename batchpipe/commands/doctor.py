"""What this machine offers a run, and what a run would miss."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchpipe import __version__
from batchpipe.job.cache_folder import cache_folder
from batchpipe.pipeline.memory import container_free_bytes

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "pyarrow", "numpy", "pydantic", "gguf", "datasets")
_CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16", "i8mm")
# Containers often give 64 MiB. Only NCCL's buffers between GPUs stand in /dev/shm; what we share has no name there.
_SMALL_SHARED_MEMORY_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `advice` says what to do about it; without what `is_broken` names, no job runs."""

    name: str
    data: Any
    text: str
    advice: str = ""
    is_broken: bool = False

    @property
    def line(self) -> str:
        mark = "BROKEN" if self.is_broken else "note" if self.advice else "ok"
        return f"{mark:<6}  {self.name}: {self.text}" + (f" ({self.advice})" if self.advice else "")


def examine() -> list[Finding]:
    """Everything that is looked at, in the order it is best read in."""
    looks: tuple[Callable[[], Finding], ...] = (
        _python,
        _packages,
        _cpu,
        _memory,
        _devices,
        _shared_memory,
        _pinned_memory,
        _compiler,
        _cache_folder,
    )
    return [look() for look in looks]


def _python() -> Finding:
    data = {"batchpipe": __version__, "python": platform.python_version(), "system": platform.platform()}
    return Finding("versions", data, f"batchpipe {__version__}, Python {data['python']}, {data['system']}")


def _packages() -> Finding:
    """Imports each package rather than asking for its version alone: one that is there can still fail to load."""
    versions: dict[str, str] = {}
    failures: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            importlib.import_module(package)
            versions[package] = importlib.metadata.version(package)
        except (ImportError, OSError, RuntimeError) as error:  # a shared library missing, two that clash
            failures[package] = str(error)
    text = ", ".join(f"{package} {version}" for package, version in versions.items())
    advice = "; ".join(f"{package} cannot be imported: {message}" for package, message in failures.items())
    return Finding("packages", {**versions, **dict.fromkeys(failures)}, text, advice, is_broken=bool(failures))


def _cpu() -> Finding:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(values.get("flags", values.get("Features", "")).split())
    model = values.get("model name", platform.processor() or platform.machine())
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    features = [feature for feature in _CPU_FEATURES if feature in flags]
    data = {"model": model, "num_cores": num_cores, "features": features}
    return Finding("cpu", data, f"{model}, {num_cores} cores, {' '.join(features) or 'no known vector features'}")


def _memory() -> Finding:
    """What weights, and KV on the CPU or in host memory, can take."""
    import psutil

    memory, container_bytes = psutil.virtual_memory(), container_free_bytes()
    data = {"total_bytes": memory.total, "available_bytes": memory.available, "container_free_bytes": container_bytes}
    text = f"{_shown_bytes(memory.available)} available of {_shown_bytes(memory.total)}"
    limited = "" if container_bytes is None else f", {_shown_bytes(container_bytes)} below the container's limit"
    return Finding("memory", data, text + limited)


def _devices() -> Finding:
    try:
        import torch
    except (ImportError, OSError, RuntimeError):  # told by the finding on packages
        return Finding("devices", [], "unknown without torch")
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    data = [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus]
    return Finding(
        "devices", data, ", ".join(f"{gpu.name} {_shown_bytes(gpu.total_memory)}" for gpu in gpus) or "cpu alone"
    )


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("shared memory", None, "no /dev/shm")
    usage = shutil.disk_usage(folder)
    advice = "raise it, in a container with --shm-size" if usage.free < _SMALL_SHARED_MEMORY_BYTES else ""
    data = {"total_bytes": usage.total, "free_bytes": usage.free}
    return Finding("shared memory", data, f"{_shown_bytes(usage.free)} free of {_shown_bytes(usage.total)}", advice)


def _pinned_memory() -> Finding:
    """Host memory that a GPU copies from. CUDA's driver pins it, whatever `ulimit -l` says."""
    in_wsl = "microsoft" in platform.release().lower()
    advice = "there engine.kv_host_memory of more than about half the memory is refused" if in_wsl else ""
    text = "as much as WSL2 lets be pinned" if in_wsl else "as much as is free; ulimit -l does not bind CUDA"
    return Finding("pinned memory", {"in_wsl": in_wsl}, text, advice)


def _compiler() -> Finding:
    found = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    advice = "" if found else "install gcc or clang; engine.attention: reference works without, slower"
    return Finding("c compiler", found, found or "none", advice)


def _cache_folder() -> Finding:
    folder = cache_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        advice = f"cannot be written: {error.strerror}; set BATCHPIPE_CACHE to a folder that can"
        return Finding("cache folder", str(folder), str(folder), advice, is_broken=True)
    return Finding("cache folder", str(folder), str(folder))


def _shown_bytes(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB" if num_bytes >= 1 << 30 else f"{num_bytes / (1 << 20):.0f} MiB"
