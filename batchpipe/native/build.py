"""Compiles the C files of this folder for the machine it runs on, once, into a cache folder.

The library's name is a hash of its sources, compiler, processor flags and OpenMP runtime, so one cache folder serves
many machines and versions, and a library found there is right. Without a compiler the callers fall back to torch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

from batchpipe.job.cache_folder import cache_folders

logger = logging.getLogger(__name__)

SOURCE_FOLDER = Path(__file__).parent
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")


@functools.cache
def load_kernels() -> ctypes.CDLL | None:
    """The compiled kernels; None, with one warning in the log, if they cannot be compiled."""
    try:
        return ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        logger.warning("CPU kernels cannot be compiled, so attention on the CPU is slow: %s", reason.strip())
        return None


def _build() -> Path:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise FileNotFoundError("no C compiler is installed (install gcc, or name one in the variable CC)")
    openmp = _openmp_library()
    key = _key(compiler, openmp)
    refusals: list[OSError] = []
    for folder in cache_folders():
        try:
            return _library_in(folder / "native", f"kernels-{key}.so", compiler, openmp)
        except OSError as error:
            refusals.append(error)
    raise refusals[0]


def _library_in(folder: Path, name: str, compiler: str, openmp: Path | None) -> Path:
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.parent.stat().st_uid != os.getuid():  # another user's library is not run
        raise PermissionError(f"{folder.parent} belongs to another user")
    folder.mkdir(exist_ok=True)
    library = folder / name
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as workspace:
            _compile(compiler, openmp, Path(workspace) / name)
            os.replace(Path(workspace) / name, library)  # of two builds at once the later replaces the same by the same
    return library


def _compile(compiler: str, openmp: Path | None, library: Path) -> None:
    """Links the file of torch's own OpenMP: a second runtime in the process would start a second set of threads."""
    objects = []
    for source in sorted(SOURCE_FOLDER.glob("*.c")):
        objects.append(str(library.with_name(source.stem + ".o")))
        _run(compiler, *FLAGS, "-c", str(source), "-o", objects[-1])
    _run(compiler, "-shared", *objects, str(openmp or "-fopenmp"), "-lm", "-o", str(library))


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


def _openmp_library() -> Path | None:
    torch = find_spec("torch")  # found, not imported, which would take seconds
    assert torch is not None and torch.origin is not None, "torch is installed with batchpipe"
    bundled = sorted((Path(torch.origin).parent / "lib").glob("libgomp*.so*"))
    return bundled[0] if bundled else None


def _key(compiler: str, openmp: Path | None) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCE_FOLDER.glob("*.[ch]")):
        digest.update(source.name.encode() + source.read_bytes())
    described = (compiler, _run(compiler, "--version"), str(openmp), *FLAGS, platform.machine(), _processor_flags())
    digest.update("\n".join(described).encode())
    return digest.hexdigest()[:20]


def _processor_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
