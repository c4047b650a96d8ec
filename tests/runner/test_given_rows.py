"""Rows that a program brings, whatever they are, run as those of a file; and a model that stays loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pytest

import batchpipe
from batchpipe.errors import InputError, JobError
from batchpipe.job.spec import InputSpec
from batchpipe.pipeline.base import Pipeline
from batchpipe.placement.placement import Placement
from batchpipe.runner.given_rows import job_with_rows, rows_table
from batchpipe.runner.run import open_placed
from batchpipe.runner.session import Session
from batchpipe.runner.start import run_job
from tests.runner.test_run import Interrupting, good_rows, job_of, open_fake
from tests.tiny_models import tiny_model

ROWS = good_rows(5)


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        tuple(ROWS),
        pd.DataFrame(ROWS, index=[9, 8, 7, 6, 5]),
        datasets.Dataset.from_list(ROWS),
        pa.Table.from_pylist(ROWS),
    ],
    ids=["list", "tuple", "pandas", "datasets", "arrow"],
)
def test_rows_of_any_kind_are_those_of_a_file(tmp_path: Path, rows: Any) -> None:
    job = job_of(tmp_path, [])
    with job_with_rows({key: job[key] for key in ("model", "sampling", "output")}, (), rows) as loaded:
        table = run_job(loaded, open_pipelines=open_fake).table()
    assert table.select(["row_id", "topic"]).to_pylist() == [
        {"row_id": row["id"], "topic": row["topic"]} for row in ROWS
    ]
    with job_with_rows(job, ["input.limit=null"], rows) as loaded:  # it is the same job again
        assert run_job(loaded, open_pipelines=open_fake).table() == table


def test_texts_become_the_prompt_column_and_missing_keys_null() -> None:
    spec = InputSpec(path=("p",), prompt_column="question")
    assert rows_table(["a", {"question": "b", "more": 1}], spec).to_pylist() == [
        {"question": "a", "more": None},
        {"question": "b", "more": 1},
    ]
    assert rows_table([], spec).schema == pa.schema([("question", pa.string())])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("one text", "rows: they are a str; give a list"),
        (7, "rows: they are a int; give a list"),
        ([{"prompt": "a"}, 3], "rows: row 1 is a int; give a list"),
        ([{"prompt": "a"}, {"prompt": 3}], "rows: .*; give a list"),
    ],
)
def test_what_makes_no_table_is_an_error(rows: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rows_table(rows, InputSpec(path=("p",)))


def test_plan_validate_and_status_are_functions(tmp_path: Path) -> None:
    job = job_of(tmp_path, good_rows(2))
    assert batchpipe.validate(job)["rows"] == 2
    assert batchpipe.validate(job, {"input.limit": 1})["rows"] == 1
    assert batchpipe.validate(job, rows=["a", "b", "c"])["rows"] == 3
    assert batchpipe.plan(job, rows=["a", "b", "c"], hardware="4xl20")["rows"] == 3
    run_job(job, open_pipelines=open_fake)
    assert batchpipe.status(tmp_path / "output")["rows_done"] == 2


def session_job(**engine: Any) -> dict[str, Any]:
    return {
        "model": {"name": str(tiny_model("llama"))},
        "sampling": {"max_tokens": 6},
        "engine": {"device": "cpu"} | engine,
    }


@pytest.mark.parametrize("num_stages", [1, 2])
def test_a_session_loads_once_and_says_what_a_run_says(tmp_path: Path, num_stages: int) -> None:
    opened: list[Placement] = []

    def opening(placement: Placement) -> Sequence[Pipeline]:
        opened.append(placement)
        return open_placed(placement)

    prompts = [f"prompt number {i}" for i in range(7)]
    alone = (
        batchpipe.run(session_job() | {"output": {"path": str(tmp_path / "output")}}, rows=prompts).table().to_pylist()
    )
    with Session(session_job(num_stages=num_stages), open_pipelines=opening) as engine:
        first, second = engine.generate(prompts[:4]), engine.generate([{"prompt": prompt} for prompt in prompts])
        short = engine.generate(prompts[:1], {"sampling.max_tokens": 2})
        assert engine.generate([]) == []
    assert len(opened) == 1
    texts = [row["completion"] for row in alone]
    assert [row["completion"] for row in first] == texts[:4] and [row["completion"] for row in second] == texts
    assert [row["completion_tokens"] for row in short] == [2]


def test_a_session_goes_on_after_an_interruption() -> None:
    def interrupting(placement: Placement) -> list[Pipeline]:
        from tests.runner.test_run import CAPACITY

        return [Interrupting(CAPACITY, placement.info.vocabulary_size, placement.info.eos_token_ids[0])]

    prompts = [f"prompt number {i}" for i in range(60)]
    with Session(session_job(), open_pipelines=interrupting) as engine:
        with pytest.raises(batchpipe.errors.InterruptedRunError):
            engine.generate(prompts)
        assert len(engine.generate(prompts)) == 60


def test_a_session_refuses_what_would_need_another_model() -> None:
    with pytest.raises(JobError, match=r"engine\.kv_host_memory: a session keeps KV on the device"):
        Session(session_job(kv_host_memory="1GiB"))
    with (
        Session(session_job(), open_pipelines=open_fake) as engine,
        pytest.raises(JobError, match="override model.dtype"),
    ):
        engine.generate(["a"], {"model.dtype": "float32"})
