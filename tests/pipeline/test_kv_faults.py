"""KV that goes wrong between the tiers: found, named in the log, its rows computed again; the job's texts are right."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batchpipe.pipeline.swap.copy_engine import EmulatedLink, Fault
from batchpipe.placement.offload_mode import OffloadChoice, OffloadMode
from batchpipe.placement.open import open_pipelines
from batchpipe.runner.result import Result
from batchpipe.runner.start import run_job
from tests.runner.test_run import good_rows, job_of

NUM_ROWS = 24
# The tiny model has 4 layers of 192 bytes a token.
BLOCK_BYTES = 4 * 192 * 4
NUM_DEVICE_BLOCKS = 40
NUM_HOST_BLOCKS = 400
# Those whose steps move nothing do nothing.
FAULTY_STEPS = range(20, 160, 5)


def job(folder: Path, **engine: Any) -> dict[str, Any]:
    keys = {
        "device": "cpu",
        "block_tokens": 4,
        "kv_device_memory": NUM_DEVICE_BLOCKS * BLOCK_BYTES,
        "attention": "reference",
        "max_batch_sequences": 8,
        "max_step_tokens": 64,
        "kv_verify": "all",
    }
    sampling = {"max_tokens": 24, "ignore_eos": True}
    sections = {"model": {"dtype": "float32"}, "plan": {"schedule": "hybrid"}}
    return job_of(folder, good_rows(NUM_ROWS), sampling=sampling, engine=keys | engine, **sections)


def run_with(
    folder: Path, offload: OffloadMode, faults: tuple[Fault, ...], num_stages: int = 1, **engine: Any
) -> Result:
    sizes = {
        "kv_device_memory": NUM_DEVICE_BLOCKS * BLOCK_BYTES // num_stages,
        "kv_host_memory": NUM_HOST_BLOCKS * BLOCK_BYTES // num_stages,
    }
    choice = OffloadChoice(offload, "given")
    return run_job(
        job(folder, **sizes, num_stages=num_stages, **engine),
        open_pipelines=lambda placement: open_pipelines(
            replace(placement, offload=choice), link=EmulatedLink(faults=faults)
        ),
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The completions of one tier where nothing runs short."""
    roomy = job(tmp_path_factory.mktemp("roomy"), kv_device_memory="4MiB")
    completions: list[str] = run_job(roomy).table()["completion"].to_pylist()
    return completions


def warned_rows(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The ids in the warnings, every one of which tells the stage and the blocks."""
    messages = [record.getMessage() for record in caplog.records if "computed again" in record.getMessage()]
    tells = re.compile(
        r"stage \d: the KV of host block \d+ (came back changed to|was overwritten in) device block \d+; row "
    )
    assert all(map(tells.match, messages))
    return [message.split("; row ")[1].split()[0] for message in messages]


@pytest.mark.parametrize(
    ("kind", "offload", "num_stages"),
    [
        ("flipped", "batch", 1),
        ("flipped", "layer", 1),
        ("flipped", "layer", 2),
        ("wrong_source", "batch", 1),
        ("wrong_source", "layer", 2),
        ("wrong_target", "batch", 1),
        ("wrong_target", "layer", 2),
        ("late", "batch", 1),
        ("late", "layer", 2),
    ],
)
def test_rows_that_met_it_are_named_and_computed_again(
    tmp_path: Path,
    expected: list[str],
    caplog: pytest.LogCaptureFixture,
    kind: Any,
    offload: OffloadMode,
    num_stages: int,
) -> None:
    faults = tuple(Fault(kind, step_id) for step_id in FAULTY_STEPS)
    result = run_with(tmp_path, offload, faults, num_stages)
    named = warned_rows(caplog)
    assert named
    assert set(named) <= {row["id"] for row in good_rows(NUM_ROWS)}
    assert result.metrics["kv_faults"] >= len(set(named))
    assert result.metrics["recomputed_tokens"] > 0
    assert (result.exit_code, result.metrics["rows_succeeded"]) == (0, NUM_ROWS)
    assert result.table()["completion"].to_pylist() == expected


def test_without_verification_the_same_fault_spoils_texts(tmp_path: Path, expected: list[str]) -> None:
    """So that the tests above would fail if nothing were found."""
    faults = tuple(Fault("wrong_source", step_id) for step_id in FAULTY_STEPS)
    result = run_with(tmp_path, "batch", faults, kv_verify="off")
    assert result.metrics["kv_faults"] == 0
    assert result.table()["completion"].to_pylist() != expected
