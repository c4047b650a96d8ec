import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner, Result

import batchpipe
from batchpipe.cli import main
from batchpipe.commands.doctor import Finding
from batchpipe.errors import InterruptedRunError, ModelError, OutputError, TooManyFailedError
from batchpipe.job import Job

JOB = "model: {name: some/model}\ninput: {path: rows.jsonl}\noutput: {path: out}\n"


@pytest.fixture
def job_path(tmp_path: Path) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return str(path)


def invoke(*arguments: str, env: Mapping[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="batchpipe", env=env)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"], ["validate", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    check = (
        "import sys; from batchpipe.cli import main; main(sys.argv[1:], standalone_mode=False);"
        "print([m for m in ('torch', 'pyarrow', 'transformers', 'pydantic', 'numpy') if m in sys.modules])"
    )
    done = python("-c", check, *arguments)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("module", ["batchpipe", "batchpipe.cli"])
def test_python_m_is_the_command(module: str) -> None:
    done = python("-m", module, "--version")
    assert (done.returncode, done.stdout) == (0, f"batchpipe {batchpipe.__version__}\n")


def test_commands_are_these() -> None:
    assert sorted(main.commands) == [
        *("doctor", "export", "plan", "predictor", "profile", "report", "run", "schema", "status", "validate"),
    ]
    predictor = main.commands["predictor"]
    assert isinstance(predictor, click.Group) and sorted(predictor.commands) == ["evaluate", "train"]
    assert [option.name for option in main.commands["run"].params] == [
        *("job_path", "overrides", "fresh", "retry_failed", "extend")
    ]


def test_run_prints_one_json_line_and_ends_with_the_results_code(
    job_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def run(job: Job, *, fresh: bool, retry_failed: bool, extend: bool) -> SimpleNamespace:
        calls.append((job, fresh, retry_failed, extend))
        return SimpleNamespace(summary={"rows_total": 3, "rows_failed": 1}, exit_code=3)

    monkeypatch.setattr(batchpipe, "run", run)
    done = invoke("run", job_path, "--set", "sampling.seed=1", "--set", "input.limit=2", "--fresh")
    assert (done.exit_code, json.loads(done.stdout)) == (3, {"rows_total": 3, "rows_failed": 1})
    invoke("run", job_path, "--retry-failed", "--extend")
    job = calls[0][0]
    assert (job.name, job.sampling.seed, job.input.limit) == ("job", 1, 2)
    assert [call[1:] for call in calls] == [(True, False, False), (False, True, True)]


@pytest.mark.parametrize(
    ("error", "code"),
    [(ModelError("no such model"), 6), (OutputError("in use"), 8), (InterruptedRunError("stopped; run it again"), 75)],
)
def test_an_error_of_ours_ends_with_its_code_and_message(
    job_path: str, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def run(job: Job, **how: bool) -> None:
        raise error

    monkeypatch.setattr(batchpipe, "run", run)
    done = invoke("run", job_path)
    assert (done.exit_code, done.stdout, done.stderr) == (code, "", f"batchpipe: {error}\n")


def test_a_stopped_run_tells_how_far_it_came(job_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(job: Job, **how: bool) -> None:
        raise TooManyFailedError("2 of 3 rows failed", {"rows_failed": 2})

    monkeypatch.setattr(batchpipe, "run", run)
    done = invoke("run", job_path)
    assert (done.exit_code, json.loads(done.stdout)) == (4, {"rows_failed": 2})
    assert done.stderr == "batchpipe: 2 of 3 rows failed\n"


def test_a_key_pressed_before_the_run_began_loses_nothing(job_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(job: Job, **how: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(batchpipe, "run", run)
    done = invoke("run", job_path)
    assert done.exit_code == 75
    assert done.stderr == "batchpipe: interrupted; the same command starts or continues the job\n"


def test_a_crash_of_ours_shows_its_traceback(job_path: str) -> None:
    crash = (
        "import sys, batchpipe\nfrom batchpipe.cli import main\n"
        "def run(job, **how): raise ZeroDivisionError('ours')\n"
        "batchpipe.run = run\nmain(['run', sys.argv[1]])"
    )
    done = python("-c", crash, job_path)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("ZeroDivisionError: ours\n")


@pytest.mark.parametrize("command", ["run", "validate"])
def test_a_wrong_job_file_ends_with_2_before_anything_is_loaded(tmp_path: Path, command: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(JOB + "engin: {}\n")
    done = invoke(command, str(path))
    assert done.exit_code == 2
    assert done.stderr == f"batchpipe: {path}: cannot be run as it is:\n  engin: unknown key; did you mean 'engine'?\n"


@pytest.mark.parametrize("arguments", [["run"], ["rum"], ["run", "a", "b"], ["run", "--fresch", "a"]])
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    assert invoke(*arguments).exit_code == 2


@pytest.mark.parametrize(("failed", "code"), [(0, 0), (2, 3)])
def test_validate_reports_rows_and_problems(
    job_path: str, monkeypatch: pytest.MonkeyPatch, failed: int, code: int
) -> None:
    prompt = None if failed else "<|start|>hi"
    report = {"rows": 5, "failed": failed, "problems": ["row 3: empty_prompt"] * failed, "first_prompt": prompt}
    fake = SimpleNamespace(validate_job=lambda job, own_process: report, shown_prompt=lambda prompt: f"shown {prompt}")
    monkeypatch.setitem(sys.modules, "batchpipe.commands.validate", fake)
    done = invoke("validate", job_path)
    assert (done.exit_code, json.loads(done.stdout)) == (code, report)
    assert done.stderr == ("row 3: empty_prompt\n" * failed or "shown <|start|>hi\n")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["profile", "./absent/model"], 6, "model.name: absent/model does not exist"),
        (["profile", "./absent/model", "--seconds", "1", "--output", "p.yaml"], 6, "model.name: absent/model"),
        (["predictor", "train", "past.jsonl", "--output", "absent/p", "--model", "m"], 2, "--output"),
        (["predictor", "train", "past.jsonl", "--model", "m"], 2, "Missing option '--output'"),
        (["predictor", "train", "--output", "p", "--model", "m"], 2, "Missing argument 'SOURCE...'"),
        (["predictor", "train", "past.jsonl", "--output", "p"], 2, "--model: nothing says which model"),
        (["predictor", "train", "past.jsonl", "--output", "p", "--job", "absent.yaml"], 2, "absent.yaml"),
        (["predictor", "evaluate", "p", "past.jsonl", "--max-tokens", "0", "--model", "m"], 2, "'--max-tokens'"),
        (["predictor", "evaluate", "p", "past.jsonl", "--model", "m", "--job", "j.yaml"], 2, "--job: j.yaml brings"),
        (["plan", "absent.yaml"], 2, "absent.yaml"),
    ],
)
def test_each_command_takes_its_options_and_tells_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke(*arguments)
    assert (done.exit_code, done.stdout) == (code, "")
    assert words in done.stderr


def test_status_prints_what_is_known_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started_at = datetime(2024, 1, 31, tzinfo=UTC)
    fake = SimpleNamespace(
        status_of=lambda folder: {"folder": folder.rpartition("/")[2], "last_run": {"started_at": started_at}},
        describe_status=lambda found: f"lines about {found['folder']}",
    )
    monkeypatch.setitem(sys.modules, "batchpipe.commands.status", fake)
    assert invoke("status", str(tmp_path / "runs")).stdout == "lines about runs\n"
    done = invoke("status", str(tmp_path / "runs"), "--json")
    assert (done.exit_code, json.loads(done.stdout)) == (
        0,
        {"folder": "runs", "last_run": {"started_at": "2024-01-31T00:00:00+00:00"}},
    )


def test_schema_is_a_json_schema() -> None:
    done = invoke("schema")
    schema = json.loads(done.stdout)
    assert done.exit_code == 0
    assert {"model", "input", "sampling", "engine", "output"} <= schema["properties"].keys()
    assert schema["required"] == ["model", "input", "output"]


@pytest.mark.parametrize(("is_broken", "code"), [(False, 0), (True, 1)])
def test_doctor_says_what_is_broken(monkeypatch: pytest.MonkeyPatch, is_broken: bool, code: int) -> None:
    findings = [Finding("cpu", 2, "2 cores"), Finding("cache folder", "/c", "/c", "move it", is_broken=is_broken)]
    monkeypatch.setattr("batchpipe.commands.doctor.examine", lambda: findings)
    done = invoke("doctor")
    assert (done.exit_code, json.loads(done.stdout)) == (code, {"cpu": 2, "cache folder": "/c"})
    assert done.stderr.splitlines() == [
        "ok      cpu: 2 cores",
        f"{'BROKEN' if is_broken else 'note  '}  cache folder: /c (move it)",
    ]


def test_log_level_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {}
    monkeypatch.setattr(logging, "basicConfig", lambda **given: settings.update(given))
    assert invoke("schema", env={"BATCHPIPE_LOG_LEVEL": "info"}).exit_code == 0
    assert settings["level"] == "INFO"


def test_unknown_log_level_is_wrong_usage() -> None:
    done = invoke("schema", env={"BATCHPIPE_LOG_LEVEL": "loud"})
    assert done.exit_code == 2
    assert "BATCHPIPE_LOG_LEVEL: 'LOUD' is not one of DEBUG, INFO" in done.stderr
