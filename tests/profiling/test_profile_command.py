"""The whole of `batchpipe profile` with a tiny model: a profile that is found again and makes a cost model."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchpipe.commands.profile import profile_command
from batchpipe.cost.model import StepWork
from batchpipe.cost.profile import find_profile, load_profile
from batchpipe.cost.profile_cost import ProfileCost
from batchpipe.errors import JobError, ModelError
from batchpipe.model.describe import describe_model
from tests.tiny_models import tiny_model


def test_a_tiny_model_is_profiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHPIPE_CACHE", str(tmp_path))
    folder = tiny_model("llama")
    printed = profile_command(str(folder), None, 1.0)
    profile = load_profile(Path(printed["file"]))
    assert find_profile(str(folder), printed["device"], "float32") == profile
    profile.check_fits("profile", describe_model(folder), printed["device"])
    assert set(printed["decode_fit"]) == {"alpha", "beta", "delta", "median_error", "worst_error"}
    assert profile.held_out.num_steps > 1
    assert profile.link.latency_seconds > 0
    cost = ProfileCost(profile, [range(2), range(2, 4)])
    assert all(cost.stage_seconds(stage, StepWork.decode(64, 640)) > 0 for stage in (0, 1))


def test_a_job_file_says_what_to_measure(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        f"model: {{name: {tiny_model('llama')}}}\ninput: {{path: rows.jsonl}}\noutput: {{path: out}}\n"
        "engine: {num_stages: 2, block_tokens: 8, attention: reference}\n"
    )
    output = tmp_path / "profile.yaml"
    assert profile_command(str(job), output, 1.0)["file"] == str(output)
    assert load_profile(output).model.num_layers == 4


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        profile_command(str(tmp_path / "nowhere" / "model.gguf"), None, 1.0)
    with pytest.raises(JobError, match="--seconds: 0 is not above 0"):
        profile_command(str(tiny_model("llama")), None, 0)
