import json
import resource
from types import SimpleNamespace

import pytest

from batchpipe import doctor


def finding(name):
    return next(found for found in doctor.examine() if found.name == name)


@pytest.fixture
def light(monkeypatch):
    """Looks at numpy alone, so that no test waits for every package to load."""
    monkeypatch.setattr(doctor, "_PACKAGES", ("numpy",))


@pytest.mark.usefixtures("light")
def test_everything_is_data_and_a_line():
    findings = doctor.examine()
    json.dumps({found.name: found.data for found in findings})
    assert len({found.name for found in findings}) == len(findings)
    assert all(found.text for found in findings)
    assert finding("cpu").data["num_cores"] >= 1
    assert finding("memory").data["available_bytes"] > 0


def test_a_package_that_is_not_there_is_broken(monkeypatch):
    monkeypatch.setattr(doctor, "_PACKAGES", ("numpy", "not_a_package"))
    found = finding("packages")
    assert found.is_broken
    assert found.data["not_a_package"] is None
    assert found.line.startswith("BROKEN  packages: numpy ")
    assert "not_a_package cannot be imported: No module named 'not_a_package'" in found.line


@pytest.mark.usefixtures("light")
def test_a_cache_folder_that_cannot_be_written_is_broken(monkeypatch, tmp_path):
    monkeypatch.setenv("BATCHPIPE_CACHE", str(tmp_path / "new" / "cache"))
    assert finding("cache folder").data == str(tmp_path / "new" / "cache")
    assert not finding("cache folder").is_broken
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BATCHPIPE_CACHE", str(tmp_path / "file"))
    found = finding("cache folder")
    assert found.is_broken
    assert "set BATCHPIPE_CACHE to a folder that can" in found.advice


@pytest.mark.usefixtures("light")
def test_a_missing_compiler_is_a_note(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    found = finding("c compiler")
    assert (found.data, found.is_broken) == (None, False)
    assert found.line.startswith("note    c compiler: none (install gcc or clang")


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize(("free_bytes", "has_advice"), [(64 << 20, True), (1 << 30, False)])
def test_little_shared_memory_is_a_note(monkeypatch, free_bytes, has_advice):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(total=1 << 30, free=free_bytes))
    assert bool(finding("shared memory").advice) is has_advice


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize(
    ("limit_bytes", "text"), [(8 << 20, "at most 8 MiB (ulimit -l)"), (resource.RLIM_INFINITY, "no limit")]
)
def test_limit_of_locked_memory(monkeypatch, limit_bytes, text):
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda kind: (limit_bytes, limit_bytes))
    assert finding("locked memory").text == text
