import json
import platform
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from batchpipe.commands import doctor


def finding(name: str) -> doctor.Finding:
    return next(found for found in doctor.examine() if found.name == name)


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at numpy alone, so that no test waits for every package to load."""
    monkeypatch.setattr(doctor, "_PACKAGES", ("numpy",))


@pytest.mark.usefixtures("light")
def test_everything_is_data_and_a_line() -> None:
    findings = doctor.examine()
    json.dumps({found.name: found.data for found in findings})
    assert len({found.name for found in findings}) == len(findings)
    assert all(found.text for found in findings)
    assert finding("cpu").data["num_cores"] >= 1
    assert finding("memory").data["available_bytes"] > 0


def test_a_package_that_is_not_there_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PACKAGES", ("numpy", "not_a_package"))
    found = finding("packages")
    assert found.is_broken
    assert found.data["not_a_package"] is None
    assert found.line.startswith("BROKEN  packages: numpy ")
    assert "not_a_package cannot be imported: No module named 'not_a_package'" in found.line


@pytest.mark.usefixtures("light")
def test_a_cache_folder_that_cannot_be_written_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BATCHPIPE_CACHE", str(tmp_path / "new" / "cache"))
    assert finding("cache folder").data == str(tmp_path / "new" / "cache")
    assert not finding("cache folder").is_broken
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BATCHPIPE_CACHE", str(tmp_path / "file"))
    found = finding("cache folder")
    assert found.is_broken
    assert "set BATCHPIPE_CACHE to a folder that can" in found.advice


@pytest.mark.usefixtures("light")
def test_a_missing_compiler_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = finding("c compiler")
    assert (found.data, found.is_broken) == (None, False)
    assert found.line.startswith("note    c compiler: none (install gcc or clang")


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize(("free_bytes", "has_advice"), [(64 << 20, True), (1 << 30, False)])
def test_little_shared_memory_is_a_note(
    monkeypatch: pytest.MonkeyPatch, free_bytes: int | None, has_advice: bool
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=1 << 30, free=free_bytes))
    assert bool(finding("shared memory").advice) is has_advice


@pytest.mark.usefixtures("light")
def test_without_torch_no_device_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    found = finding("devices")
    assert (found.data, found.text, found.is_broken) == ([], "unknown without torch", False)


@pytest.mark.usefixtures("light")
def test_a_system_without_dev_shm_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_dir", lambda path: False)
    assert finding("shared memory").line == "ok      shared memory: no /dev/shm"


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize(
    ("release", "in_wsl"), [("6.6.87.2-microsoft-standard-WSL2", True), ("5.15.0-113-generic", False)]
)
def test_what_can_be_pinned(monkeypatch: pytest.MonkeyPatch, release: str, in_wsl: bool) -> None:
    monkeypatch.setattr(platform, "release", lambda: release)
    found = finding("pinned memory")
    assert found.data == {"in_wsl": in_wsl}
    assert ("engine.kv_host_memory" in found.advice) is in_wsl


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize(("free_bytes", "words"), [(None, "of "), (3 << 30, ", 3.0 GiB below the container's limit")])
def test_a_containers_limit_is_told(monkeypatch: pytest.MonkeyPatch, free_bytes: int | None, words: str) -> None:
    monkeypatch.setattr(doctor, "container_free_bytes", lambda: free_bytes)
    found = finding("memory")
    assert found.data["container_free_bytes"] == free_bytes
    assert words in found.text and ("container" in found.text) is (free_bytes is not None)
