"""A quick look at a processor of which no profile was measured: the rates of a matrix product and of a sum over memory.

It is kept for a day, because looking imports torch and takes a second.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import perf_counter

import msgspec

from batchpipe.job.cache_folder import cache_folder

_LOOK_SECONDS = 0.5  # each for products and for memory
_KEPT_SECONDS = 86_400
_MATRIX_SIZE = 1024
_MEMORY_NUMBERS = 64 << 20


class Rates(msgspec.Struct, frozen=True):
    flops_per_second: float
    memory_bytes_per_second: float


def quick_look(device_name: str, dtype: str) -> Rates:
    """The rates of this process's processors, which are called `device_name`, in `dtype`."""
    name = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", part).strip("_") for part in (device_name, dtype))
    path = cache_folder() / "looks" / f"{name}.json"
    kept = _kept(path)
    if kept is not None:
        return kept
    rates = _look(dtype)
    with suppress(OSError):  # a machine without a cache folder looks each time
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(rates))
    return rates


def _kept(path: Path) -> Rates | None:
    try:
        is_fresh = time.time() - path.stat().st_mtime < _KEPT_SECONDS
        return msgspec.json.decode(path.read_bytes(), type=Rates) if is_fresh else None
    except (OSError, msgspec.MsgspecError):  # none yet, or torn by a crash
        return None


def _look(dtype: str) -> Rates:
    import torch

    matrix = torch.randn(_MATRIX_SIZE, _MATRIX_SIZE).to(getattr(torch, dtype))
    memory = torch.ones(_MEMORY_NUMBERS)
    return Rates(
        flops_per_second=2.0 * _MATRIX_SIZE**3 / _fastest_seconds(lambda: matrix @ matrix),
        memory_bytes_per_second=memory.nbytes / _fastest_seconds(memory.sum),
    )


def _fastest_seconds(work: Callable[[], object]) -> float:
    best = float("inf")
    end = perf_counter() + _LOOK_SECONDS
    while perf_counter() < end:
        started = perf_counter()
        work()
        best = min(best, perf_counter() - started)
    return best
