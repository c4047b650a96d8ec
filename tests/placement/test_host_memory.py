"""Jobs whose KV is on two tiers, from the job file to completions and metrics, with a real tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batchpipe.commands.plan import describe_plan, plan_job
from batchpipe.errors import JobError, MemoryLimitError
from batchpipe.job import load_job
from batchpipe.placement import open as opening
from batchpipe.runner.start import run_job
from tests.runner.test_run import good_rows, job_of

# The tiny model has 4 layers of 192 bytes a token: blocks of 6 KiB on one stage, 3 KiB on each of two.
BLOCK_BYTES = 4 * 192 * 8
NUM_DEVICE_BLOCKS = 24
NUM_ROWS = 24
HOST = {"kv_host_memory": 4 << 20}


def job(folder: Path, **engine: Any) -> dict[str, Any]:
    keys = {
        "device": "cpu",
        "block_tokens": 8,
        "kv_device_memory": NUM_DEVICE_BLOCKS * BLOCK_BYTES // engine.get("num_stages", 1),
        "attention": "reference",
        "max_batch_sequences": 8,
        "max_step_tokens": 64,
    }
    sampling = {"max_tokens": 24, "ignore_eos": True}
    # `hybrid` admits as much as there is room for on the host.
    sections = {"model": {"dtype": "float32"}, "plan": {"schedule": "hybrid"}}
    return job_of(folder, good_rows(NUM_ROWS), sampling=sampling, engine=keys | engine, **sections)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The completions where nothing runs short."""
    roomy = job(tmp_path_factory.mktemp("roomy"), kv_device_memory="4MiB")
    completions: list[str] = run_job(roomy).table()["completion"].to_pylist()
    return completions


@pytest.mark.parametrize(
    "engine",
    [
        {"offload": "auto"},
        {"offload": "batch"},
        {"offload": "auto", "num_stages": 2},
    ],
    ids=str,
)
def test_completions_are_the_same_and_what_moved_is_counted(
    tmp_path: Path, expected: list[str], engine: dict[str, Any]
) -> None:
    result = run_job(job(tmp_path, **HOST, **engine, kv_verify="all"))
    assert result.table()["completion"].to_pylist() == expected
    metrics = result.metrics
    assert 0 < metrics["peak_device_blocks"] <= NUM_DEVICE_BLOCKS < metrics["peak_host_blocks"]
    assert metrics["host_to_device_bytes"] > 0
    # Every token that was computed is stored, in all layers; a row's last one is drawn and not computed.
    num_stored_tokens = metrics["prompt_tokens"] - metrics["reused_tokens"] + metrics["completion_tokens"] - NUM_ROWS
    assert metrics["device_to_host_bytes"] == num_stored_tokens * 4 * 192
    assert metrics["stall_seconds"] >= 0
    assert (metrics["kv_faults"], metrics["preemptions"]) == (0, 0)


def test_one_tier_where_it_is_asked_for_or_would_not_help(
    tmp_path: Path, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    result = run_job(job(tmp_path, kv_host_memory=NUM_DEVICE_BLOCKS * BLOCK_BYTES))
    assert result.table()["completion"].to_pylist() == expected
    assert "engine.kv_host_memory is not used: engine.kv_host_memory holds 24 blocks and the device 24" in caplog.text
    metrics = result.metrics
    assert (metrics["peak_host_blocks"], metrics["host_to_device_bytes"], metrics["device_to_host_bytes"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("engine", "error", "words"),
    [
        ({"kv_host_memory": "900TiB"}, MemoryLimitError, "lower engine.kv_host_memory to"),
        ({"kv_host_memory": "900TiB", "num_stages": 2, "replicas": 2}, MemoryLimitError, "for 4 of them"),
        ({"kv_host_memory": "8KiB", "offload": "batch"}, MemoryLimitError, "raise engine.kv_host_memory"),
        ({**HOST, "num_stages": 2, "offload": "layer"}, JobError, "lower engine.num_stages"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: dict[str, Any], error: type[Exception], words: str
) -> None:
    loaded: list[object] = []
    for name in ("LocalPipeline", "MultiprocessPipeline"):
        monkeypatch.setattr(opening, name, lambda *arguments: loaded.append(arguments))
    with pytest.raises(error, match=words):
        run_job(job(tmp_path, **engine))
    assert not loaded


def test_the_plan_shows_both_tiers_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHPIPE_CACHE", str(tmp_path / "cache"))
    found = plan_job(load_job(job(tmp_path, **HOST)))
    assert (found["offload"], found["kv_host_bytes_per_stage"]) == ("layer", ((4 << 20) // BLOCK_BYTES * BLOCK_BYTES,))
    assert found["kv_bytes_per_stage"] == (NUM_DEVICE_BLOCKS * BLOCK_BYTES,)
    assert found["kv_capacity_tokens"] == (4 << 20) // BLOCK_BYTES * 8
    text = describe_plan(found)
    assert "and 0.00 GiB on the host" in text
    assert "KV offload: layer (layer by layer beside a step)" in text


def test_the_plan_of_one_tier_says_so(tmp_path: Path) -> None:
    found = plan_job(load_job(job(tmp_path)), "l20")
    assert (found["offload"], found["kv_host_bytes_per_stage"]) == ("none", (0,))
    assert "KV offload: none (engine.kv_host_memory is 0)" in describe_plan(found)
    assert "on the host" not in describe_plan(found)
