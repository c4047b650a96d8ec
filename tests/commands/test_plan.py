"""`batchpipe plan` on a tiny model: what it says follows the job, the machine and the rows done so far."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from batchpipe.cli import main
from batchpipe.commands.plan import describe_plan, plan_job
from batchpipe.errors import InputError, JobError, ModelError
from batchpipe.job import load_job
from batchpipe.runner.start import run_job
from tests.runner.test_run import good_rows, job_of, open_fake
from tests.tiny_models import tiny_model


def plan(tmp_path: Path, rows: list[Any], hardware: str | None = "4xl20", **sections: dict[str, Any]) -> dict[str, Any]:
    return plan_job(load_job(job_of(tmp_path, rows, **sections)), hardware)


def test_a_small_model_is_copied_to_every_device(tmp_path: Path) -> None:
    found = plan(tmp_path, good_rows(30))
    assert (found["num_stages"], found["num_replicas"], found["rows"]) == (1, 4, 30)
    assert found["link_bytes"] == 0
    assert 0 < found["generate_seconds_low"] <= found["generate_seconds"] <= found["generate_seconds_high"]
    assert 0 < found["completion_tokens"] <= 30 * 12
    assert found["prompt_tokens"] > 30
    assert "4 x NVIDIA L20" in describe_plan(found)


def test_stages_share_layers_and_memory_and_use_the_link(tmp_path: Path) -> None:
    found = plan(tmp_path, good_rows(30), engine={"num_stages": 2, "replicas": 1})
    assert len(found["weight_bytes_per_stage"]) == len(found["kv_bytes_per_stage"]) == 2
    assert found["link_bytes"] > 0
    assert len(found["stage_utilization"]) == 2


def test_rows_without_a_forecast_are_taken_to_reach_their_limit(tmp_path: Path) -> None:
    found = plan(tmp_path, good_rows(20), predict={"method": "none"})
    assert found["completion_tokens"] == 20 * 12
    assert found["generate_seconds_low"] == found["generate_seconds"] == found["generate_seconds_high"]
    assert found["lengths_from"] == "sampling.max_tokens"


def test_rows_done_so_far_are_learnt_from(tmp_path: Path) -> None:
    before = plan(tmp_path, good_rows(60))
    run_job(job_of(tmp_path, good_rows(60)), open_pipelines=open_fake)
    after = plan(tmp_path, good_rows(60))
    assert before["lengths_from"] == "general prior"
    assert after["lengths_from"] == "general prior and 60 rows done"


def test_memory_too_small_for_all_rows_is_seen_as_such(tmp_path: Path) -> None:
    engine = {"block_tokens": 1, "kv_device_memory": "64KiB"}
    found = plan(tmp_path, good_rows(40), hardware="l20", engine=engine, predict={"method": "none"})
    assert found["peak_kv_fraction"] > 0.7
    roomy = plan(tmp_path, good_rows(40), hardware="l20", predict={"method": "none"})
    assert roomy["generate_seconds"] < found["generate_seconds"]
    assert found["knob"] is not None
    assert found["knob"]["key"] == "engine.kv_device_memory"


def test_this_machine_is_planned_without_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHPIPE_CACHE", str(tmp_path / "cache"))
    found = plan(tmp_path, good_rows(10), hardware=None)
    assert found["times_from"].startswith("estimate")
    assert found["generate_seconds"] > 0


@pytest.mark.parametrize("hardware", [None, "4xl20"])
def test_a_model_without_weights_is_planned_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hardware: str | None
) -> None:
    monkeypatch.setenv("BATCHPIPE_CACHE", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))
    model = {"model": {"name": str(folder)}}
    engine = {"kv_device_memory": "64KiB", "num_stages": 2}
    whole = plan(tmp_path, good_rows(30), hardware, engine=engine, **model)
    (folder / "model.safetensors").unlink()
    found = plan(tmp_path, good_rows(30), hardware, engine=engine, **model)
    assert found | {"planner_fraction": 0} == whole | {"planner_fraction": 0}
    with pytest.raises(ModelError, match=r"has no model\.safetensors") as refusal:
        run_job(job_of(tmp_path, good_rows(30), **model))
    assert refusal.value.exit_code == 6


def test_of_a_long_input_the_first_rows_stand_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: dict[str, Any] = {"predict": {"method": "none"}, "engine": {"max_batch_sequences": 8}}
    whole = plan(tmp_path, good_rows(400), "l20", **keys)
    monkeypatch.setattr("batchpipe.commands.plan.SAMPLE_ROWS", 100)
    found = plan(tmp_path, good_rows(400), "l20", **keys)
    assert (whole["simulated_rows"], found["simulated_rows"]) == (400, 100)
    assert found["rows"] == pytest.approx(400, rel=0.05)
    assert found["completion_tokens"] == pytest.approx(whole["completion_tokens"], rel=0.05)
    assert found["generate_seconds"] == pytest.approx(whole["generate_seconds"], rel=0.2)


def test_the_command_prints_lines_for_people_and_a_json_line(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(job_of(tmp_path, good_rows(10))))
    done = CliRunner().invoke(main, ["plan", str(path), "--hardware", "2xl20", "--set", "engine.num_stages=2"])
    assert (done.exit_code, done.stderr) == (0, "")
    *lines, last = done.stdout.splitlines()
    found = json.loads(last)
    assert lines == describe_plan(found).splitlines()
    assert (found["num_stages"], found["rows"]) == (2, 10)


@pytest.mark.parametrize(
    ("seconds", "words"), [(7.25, "7.2 s"), (119.9, "119.9 s"), (120, "2 min"), (7199, "120 min"), (9000, "2.5 h")]
)
def test_times_are_told_in_seconds_minutes_or_hours(tmp_path: Path, seconds: float, words: str) -> None:
    found = plan(tmp_path, good_rows(4)) | {"generate_seconds": seconds}
    assert f"about {words} (" in describe_plan(found)


@pytest.mark.parametrize("hardware", ["9xnothing", "missing.yaml"])
def test_a_machine_that_is_not_described_is_refused(tmp_path: Path, hardware: str) -> None:
    with pytest.raises(JobError, match="hardware"):
        plan(tmp_path, good_rows(4), hardware=hardware)


def test_more_stages_than_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="engine.num_stages is 2"):
        plan(tmp_path, good_rows(4), hardware="l20", engine={"num_stages": 2})


def test_an_input_of_which_nothing_can_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="validate"):
        plan(tmp_path, [{"id": "a", "prompt": ""}, {"id": "b", "prompt": ""}])
