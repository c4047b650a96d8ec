"""Where the compiled kernels are kept, and what happens where they cannot be had."""

import ctypes
import logging
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from batchpipe.attention.choose import choose_backend
from batchpipe.native import build


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder and nothing loaded; compiling is kept quick."""
    monkeypatch.setenv("BATCHPIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(build, "FLAGS", ("-fPIC", "-fopenmp"))
    monkeypatch.setattr(build, "load_kernels", build.load_kernels.__wrapped__)
    return tmp_path


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.so"))


def test_is_compiled_once_and_leaves_nothing_else(fresh: Path) -> None:
    assert isinstance(build.load_kernels(), ctypes.CDLL)
    (library,) = libraries(fresh)
    written = library.stat().st_mtime_ns
    assert isinstance(build.load_kernels(), ctypes.CDLL)
    assert [path.name for path in library.parent.iterdir()] == [library.name]
    assert library.stat().st_mtime_ns == written


def test_another_source_is_another_library(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.load_kernels()
    copy = fresh / "sources"
    copy.mkdir()
    for source in build.SOURCE_FOLDER.glob("*.[ch]"):
        (copy / source.name).write_bytes(source.read_bytes())
    (copy / "layers.c").write_text((copy / "layers.c").read_text() + "/* changed */\n")
    monkeypatch.setattr(build, "SOURCE_FOLDER", copy)
    build.load_kernels()
    assert len(libraries(fresh)) == 2


def test_a_folder_that_cannot_be_made_falls_back_to_the_temporary_one(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fresh / "file").touch()
    monkeypatch.setenv("BATCHPIPE_CACHE", str(fresh / "file" / "cache"))
    assert isinstance(build.load_kernels(), ctypes.CDLL)
    (library,) = libraries(fresh)
    assert library.parent.parent.name == f"batchpipe-{os.getuid()}"
    assert stat.S_IMODE(library.parent.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-compiler", "install gcc"), ("false", "returned non-zero exit status 1")]
)
def test_without_a_compiler_the_reference_steps_in(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, compiler: str, reason: str
) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr("batchpipe.attention.cpu.load_kernels", build.load_kernels)
    with caplog.at_level(logging.WARNING):
        backend = choose_backend("auto", torch.device("cpu"), torch.bfloat16, 64)
    assert backend.name == "reference"
    (record,) = caplog.records
    assert "CPU kernels cannot be compiled" in record.message and reason in record.message


def test_one_openmp_runtime_serves_torch_and_the_kernels() -> None:
    program = (
        "import torch; from batchpipe.native.build import load_kernels; assert load_kernels(); torch.ones(9).sum();"
        "print({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line})"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.count("libgomp") == 1


@pytest.mark.parametrize(
    ("name", "dtype", "head_dim", "expected"),
    [
        ("auto", torch.bfloat16, 64, "cpu"),
        ("cpu", torch.float32, 256, "cpu"),
        ("reference", torch.bfloat16, 64, "reference"),
        ("auto", torch.float16, 64, "reference"),
        ("auto", torch.float32, 40, "reference"),
        ("auto", torch.float32, 512, "reference"),
    ],
)
def test_choice_of_backend(name: str, dtype: torch.dtype, head_dim: int, expected: str) -> None:
    assert choose_backend(name, torch.device("cpu"), dtype, head_dim).name == expected
