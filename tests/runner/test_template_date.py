"""A date that a chat template writes is that of the job's first start."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from batchpipe.errors import OutputError
from batchpipe.job import load_job
from batchpipe.runner.prepare import Prepared, prepare
from batchpipe.runner.start import run_job
from tests.runner.test_run import good_rows, job_of, open_fake

TEMPLATE = "{{ strftime_now('%d %B %Y') }}|{% for message in messages %}{{ message.content }}{% endfor %}>"


def dated_job(folder: Path) -> dict[str, object]:
    (folder / "dated.jinja").write_text(TEMPLATE)
    return job_of(folder, good_rows(3), input={"chat_template": str(folder / "dated.jinja")})


def prompts(prepared: Prepared) -> list[str]:
    rows = [row for row in prepared.source.rows() if not hasattr(row, "code")]
    return [str(prepared.renderer.render(row.values)) for row in rows]


def test_a_job_that_goes_on_another_day_writes_the_day_of_its_start(tmp_path: Path) -> None:
    job = dated_job(tmp_path)
    today = datetime.now().strftime("%d %B %Y")
    assert prompts(prepare(load_job(job)))[0].startswith(f"{today}|")
    run_job(job, open_pipelines=open_fake)
    started = tmp_path / "output" / "_batchpipe" / "started"
    assert datetime.fromisoformat(started.read_text()).tzinfo is not None
    started.write_text(datetime(2024, 2, 29, 23, 59, tzinfo=UTC).isoformat())
    assert prompts(prepare(load_job(job))) == [f"29 February 2024|prompt number {i}>" for i in range(3)]
    run_job(job, fresh=True, open_pipelines=open_fake)
    assert datetime.fromisoformat(started.read_text()).year > 2024


def test_a_start_that_is_no_time_is_told(tmp_path: Path) -> None:
    job = dated_job(tmp_path)
    run_job(job, open_pipelines=open_fake)
    (tmp_path / "output" / "_batchpipe" / "started").write_text("once")
    with pytest.raises(OutputError, match="started: is no time"):
        run_job(job, open_pipelines=open_fake)
