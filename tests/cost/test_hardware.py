"""Hardware files: all load, several devices are one device's file, and every mistake is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchpipe.cost.hardware import known_hardware, load_hardware
from batchpipe.errors import JobError

L20 = known_hardware()["l20"].read_text()


@pytest.mark.parametrize("name", sorted(known_hardware()))
def test_every_file_that_comes_with_batchpipe_loads(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.num_devices == 1
    assert hardware.device.effective_link.host_to_device_bytes_per_second <= (
        hardware.device.link.host_to_device_bytes_per_second
    )


@pytest.mark.parametrize("name", ["4xl20", str(known_hardware()["l20"].with_name("4xl20.yaml"))])
def test_several_devices_by_name_and_by_path(name: str) -> None:
    hardware = load_hardware(name)
    assert hardware.num_devices == 4
    assert hardware.device == load_hardware("l20").device
    assert hardware.all_reduce_rate() == 14.65e9  # as TD-Pipe measured


def test_a_file_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(L20.replace("NVIDIA L20", "Mine"))
    assert load_hardware(str(tmp_path / "mine.yaml")).device.name == "Mine"
    assert load_hardware(str(tmp_path / "3xmine.yaml")).num_devices == 3


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("memory_bytes_per_second: 864e9", "", "memory_bytes_per_second: is required"),
        ("memory_bytes_per_second:", "memory_bytes_per_seconds:", "did you mean 'memory_bytes_per_second'?"),
        ("119.5e12", "fast", "bf16_flops_per_second: 'fast' is not a finite number > 0"),
        ("latency_seconds: 1e-5", "latency_seconds: '1e-5'", "link.latency_seconds: '1e-5' is not"),
        ("compute: 0.88", "compute: 88", "efficiency.compute: 88 is not a number above 0, up to 1"),
        ("  4: 14.65e9", "  4: -1", "all_reduce_bytes_per_second:"),
        ("control_seconds: 3e-3", "control_seconds: .nan", "control_seconds:"),
    ],
)
def test_a_wrong_number_is_refused_by_name(tmp_path: Path, old: str, new: str, expected: str) -> None:
    path = tmp_path / "mine.yaml"
    assert old in L20
    path.write_text(L20.replace(old, new))
    with pytest.raises(JobError) as refusal:
        load_hardware(str(path))
    assert str(path) in str(refusal.value)
    assert expected in str(refusal.value)


@pytest.mark.parametrize("text", ["- name: L20", "L20", ""])
def test_a_file_that_holds_no_keys_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(JobError, match=r"mine\.yaml: holds .*; it must be a mapping of name, memory_bytes, "):
        load_hardware(str(path))


@pytest.mark.parametrize("name", ["l21", "0xl20", "nowhere/l20.yaml", "nowhere/4xl20.yaml", ""])
def test_unknown_hardware_is_refused(name: str) -> None:
    with pytest.raises(JobError, match="hardware: "):
        load_hardware(name)


def test_no_all_reduce_rate_is_made_up() -> None:
    with pytest.raises(JobError, match="no rate for 3 devices"):
        load_hardware("3xl20").all_reduce_rate()
