"""Commands that compute nothing import no heavy library: it is what their time goes to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from batchpipe.placement.devices import has_cuda_driver
from batchpipe.runner.start import run_job
from tests.runner.test_run import good_rows, job_of, open_fake

_PROGRAM = """
import sys
from batchpipe.cli import entry
try:
    entry()
except SystemExit as end:
    print(end.code, *[name for name in ("torch", "transformers", "pandas", "pydantic") if name in sys.modules])
"""


def ran(*arguments: object) -> list[str]:
    """The exit code, and the heavy libraries that were imported."""
    command = [sys.executable, "-c", _PROGRAM, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout.splitlines() or [done.stderr])[-1].split()


@pytest.mark.skipif(has_cuda_driver(), reason="torch is asked for the GPU")
def test_validate_a_finished_job_and_status(tmp_path: Path) -> None:
    job = job_of(tmp_path, [*good_rows(3), "no json"])
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    code, *imported = ran("validate", path)
    assert code == "3" and "transformers" in imported and "torch" not in imported
    run_job(path, open_pipelines=open_fake)
    assert ran("run", path) == ["3", "pydantic"]
    assert ran("status", tmp_path / "output") == ["0"]


def test_a_missing_file_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job_of(tmp_path, [], input={"path": "absent.jsonl"})))
    assert ran("run", path) == ["5", "pydantic"]
