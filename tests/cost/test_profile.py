"""Profiles: what is written is read, the cost is the sum of the tables, and a profile of something else is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from batchpipe.cost.hardware import Link
from batchpipe.cost.model import CostModel, KvLink, StepWork
from batchpipe.cost.model_shape import ModelShape
from batchpipe.cost.profile import (
    Profile,
    ProfiledError,
    ProfiledFit,
    ProfiledModel,
    StepTimes,
    find_profile,
    load_profile,
    profile_path,
    save_profile,
)
from batchpipe.cost.profile_cost import ProfileCost
from batchpipe.errors import JobError

MODEL = ModelShape(
    name="tiny",
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    hidden_size=64,
    vocabulary_size=500,
    dtype="bfloat16",
    layer_flops=(1.0,) * 6,
    layer_weight_bytes=(1,) * 6,
)
PROFILE = Profile(
    version=1,
    device="a CPU, 2 threads",
    measured_on="2026-11-21",
    model=ProfiledModel(
        name="org/tiny",
        dtype="bfloat16",
        num_layers=6,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        hidden_size=64,
        vocabulary_size=500,
    ),
    times=StepTimes(
        step_seconds=((1, 1e-4), (256, 2e-4)),
        layer_seconds=((1, 1e-3), (128, 1e-3), (129, 2e-3), (256, 2e-3)),
        head_seconds=((1, 3e-3), (256, 5e-3)),
        decode_attention_seconds={1: ((0, 0.0), (1000, 1e-4)), 128: ((0, 0.0), (1000, 8e-3))},
        prefill_attention_seconds=((100, 1e-5), (10_000, 1e-3)),
        greedy_row_seconds=1e-5,
        random_row_seconds=1e-4,
    ),
    link=Link(
        host_to_device_bytes_per_second=1e10,
        device_to_host_bytes_per_second=9e9,
        device_to_device_bytes_per_second=1e9,
        latency_seconds=2e-5,
    ),
    control_seconds=4e-5,
    decode_fit=ProfiledFit(alpha=1e-4, beta=1e-8, delta=-1e-3, median_error=0.02, worst_error=0.1),
    held_out=ProfiledError(num_steps=9, median_error=0.01, worst_error=0.05),
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "profile.yaml"
    save_profile(PROFILE, path)
    assert load_profile(path) == PROFILE
    assert [file.name for file in path.parent.iterdir()] == ["profile.yaml"]


def test_a_kept_profile_is_found_by_model_device_and_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHPIPE_CACHE", str(tmp_path))
    save_profile(PROFILE, profile_path("org/tiny", PROFILE.device, "bfloat16"))
    assert find_profile("org/tiny", PROFILE.device, "bfloat16") == PROFILE
    assert find_profile("org/other", PROFILE.device, "bfloat16") is None
    assert find_profile("org/tiny", "another", "bfloat16") is None
    assert find_profile("org/tiny", PROFILE.device, "float32") is None


def test_the_cost_is_the_sum_of_the_tables() -> None:
    cost: CostModel = ProfileCost(PROFILE, [range(4), range(4, 6)])
    assert cost.num_stages == 2
    assert cost.control_seconds == 4e-5
    decode = StepWork.decode(128, 128 * 500)
    attention = 4e-3  # half of what the table has at a context of 1000
    step = 1e-4 + (128 - 1) / 255 * 1e-4
    assert cost.stage_seconds(0, decode) == pytest.approx(step + 4 * (1e-3 + attention))
    head = 3e-3 + (128 - 1) / 255 * 2e-3 + 128 * 1e-5
    assert cost.stage_seconds(1, decode) == pytest.approx(step + 2 * (1e-3 + attention) + head)
    assert cost.handoff_seconds(1000) == pytest.approx(2e-5 + 1000 * 64 * 2 / 1e9)
    prompt = StepWork(256, 0, 0, 0, 10_000)
    assert cost.stage_seconds(1, prompt) == pytest.approx(2e-4 + 2 * (2e-3 + 1e-3))


def test_a_stages_link_carries_the_kv_of_its_layers() -> None:
    links = ProfileCost(PROFILE, [range(4), range(4, 6)]).kv_links
    # Keys and values of two heads of 16 numbers of two bytes in a layer.
    assert links == (KvLink(1e10, 9e9, 128, 4), KvLink(1e10, 9e9, 128, 2))


def test_rows_that_are_not_greedy_cost_more() -> None:
    greedy, random = (ProfileCost(PROFILE, [range(6)], share) for share in (0.0, 1.0))
    work = StepWork.decode(100, 1000)
    more = random.stage_seconds(0, work) - greedy.stage_seconds(0, work)
    assert more == pytest.approx(100 * (1e-4 - 1e-5))


def test_a_profile_that_fits_is_taken_whatever_the_model_is_called() -> None:
    PROFILE.check_fits("p.yaml", replace(MODEL, name="/models/tiny"), PROFILE.device)


@pytest.mark.parametrize(
    ("model", "device", "expected"),
    [
        (MODEL, "another CPU", "p.yaml: device: was measured on 'a CPU, 2 threads' and this is"),
        (
            replace(MODEL, dtype="float32"),
            PROFILE.device,
            "p.yaml: model.dtype: was measured in bfloat16 and runs in float32",
        ),
        (
            replace(MODEL, name="big", num_layers=7),
            PROFILE.device,
            "p.yaml: model.num_layers: was measured with org/tiny, which has 6, and big has 7",
        ),
        (replace(MODEL, num_kv_heads=4), PROFILE.device, "model.num_kv_heads"),
    ],
)
def test_a_profile_of_something_else_is_refused(model: ModelShape, device: str, expected: str) -> None:
    with pytest.raises(JobError) as refusal:
        PROFILE.check_fits("p.yaml", model, device)
    assert expected in str(refusal.value)
    assert "batchpipe profile" in str(refusal.value)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("version: 1", "version: 2", "version: 2 is not 1"),
        ("control_seconds: 4.0e-05\n", "", "control_seconds: is required"),
        ("  greedy_row_seconds: 1.0e-05\n", "", "times.greedy_row_seconds: is required"),
        ("measured_on", "measured_of", "measured_of: unknown key; did you mean 'measured_on'?"),
        ("- [129.0, 0.002]", "- [128.0, 0.002]", "times.layer_seconds:"),
        ("- [129.0, 0.002]", "- [129.0, slow]", "times.layer_seconds:"),
        ("num_layers: 6", "num_layers: six", "model.num_layers: 'six' is not an integer >= 1"),
    ],
)
def test_a_damaged_profile_is_refused_by_key(tmp_path: Path, old: str, new: str, expected: str) -> None:
    path = tmp_path / "profile.yaml"
    save_profile(PROFILE, path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(JobError) as refusal:
        load_profile(path)
    assert str(path) in str(refusal.value)
    assert expected in str(refusal.value)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match="cannot be written.*--output"):
        save_profile(PROFILE, tmp_path / "file" / "profile.yaml")
