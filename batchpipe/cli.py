"""The command line. Each command imports what it needs when it runs, so that `--help` is fast.

Data and one closing JSON line go to stdout; messages and logs go to stderr. Nothing is coloured.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import batchpipe
from batchpipe.errors import BatchpipeError, InterruptedRunError, StoppedRunError

if TYPE_CHECKING:
    from batchpipe.job import Job

_SOME_ROWS_FAILED = 3
_PATH: click.Path = click.Path(path_type=Path)
OWN_PROCESS = object()  # the context's object where the process was started for this one command
_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


class _ExitCodes(click.Group):
    """Prints a BatchpipeError to stderr and ends with its exit code; any other exception is a crash of batchpipe."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BatchpipeError as error:
            click.echo(f"batchpipe: {error}", err=True)
            if isinstance(error, StoppedRunError) and error.summary is not None:
                click.echo(_json(error.summary))
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            # A run turns the signal into an InterruptedRunError itself; before the run begins nothing can be lost.
            click.echo("batchpipe: interrupted; the same command starts or continues the job", err=True)
            ctx.exit(InterruptedRunError.exit_code)


def _job_command(command: Any) -> Any:
    """Gives a command the JOB argument and the --set option."""
    overrides_help = "Override a key, as in sampling.seed=1; repeatable. Relative paths go by the working folder."
    command = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help=overrides_help)(command)
    return click.argument("job_path", metavar="JOB", type=_PATH)(command)


def _json(data: Mapping[str, Any]) -> str:
    """One line of JSON, in which times are written as in ISO 8601."""
    return json.dumps(data, default=datetime.isoformat)


def _load(job_path: Path, overrides: tuple[str, ...]) -> Job:
    from batchpipe.job import load_job

    return load_job(job_path, overrides)


@click.group(cls=_ExitCodes, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(batchpipe.__version__, prog_name="batchpipe", message="%(prog)s %(version)s")
def main() -> None:
    """Run a language model over a table of prompts, offline, without losing a row."""
    level = os.environ.get("BATCHPIPE_LOG_LEVEL", "WARNING").upper()
    if level not in _LOG_LEVELS:
        raise click.UsageError(f"BATCHPIPE_LOG_LEVEL: {level!r} is not one of {', '.join(_LOG_LEVELS)}")
    logging.basicConfig(level=level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


@main.command()
@_job_command
@click.option("--fresh", is_flag=True, help="Move an old output folder aside and start anew.")
@click.option("--retry-failed", is_flag=True, help="Run rows that failed again; the others stay as they are.")
@click.option("--extend", is_flag=True, help="Run the new rows of an input that only grew, or of a raised input.limit.")
@click.pass_context
def run(
    context: click.Context, job_path: Path, overrides: tuple[str, ...], fresh: bool, retry_failed: bool, extend: bool
) -> None:
    """Run JOB, or continue it where it stopped."""
    result = batchpipe.run(_load(job_path, overrides), fresh=fresh, retry_failed=retry_failed, extend=extend)
    click.echo(_json(result.summary))
    context.exit(result.exit_code)


@main.command()
@_job_command
@click.pass_context
def validate(context: click.Context, job_path: Path, overrides: tuple[str, ...]) -> None:
    """Check JOB and every row of its input; no model is loaded."""
    job = _load(job_path, overrides)
    from batchpipe.commands.validate import shown_prompt, validate_job

    report = validate_job(job, own_process=context.obj is OWN_PROCESS)
    for problem in report["problems"]:
        click.echo(problem, err=True)
    if report["first_prompt"] is not None:
        click.echo(shown_prompt(report["first_prompt"]), err=True)
    click.echo(_json(report))
    context.exit(_SOME_ROWS_FAILED if report["failed"] else 0)


@main.command()
@_job_command
@click.option("--hardware", metavar="NAME|FILE", help="Another machine, as in 4xl20 or a hardware file.")
@click.pass_context
def plan(context: click.Context, job_path: Path, overrides: tuple[str, ...], hardware: str | None) -> None:
    """Tell what JOB would take, here or on another machine; no model is loaded."""
    job = _load(job_path, overrides)
    from batchpipe.commands.plan import describe_plan, plan_job

    found = plan_job(job, hardware, own_process=context.obj is OWN_PROCESS)
    click.echo(describe_plan(found))
    click.echo(_json(found))


@main.command()
@click.argument("model_or_job", metavar="MODEL|JOB")
@click.option("--output", type=_PATH, help="The profile's file; by default where runs look for it.")
@click.option("--seconds", type=float, default=100.0, show_default=True, help="How long to measure.")
def profile(model_or_job: str, output: Path | None, seconds: float) -> None:
    """Measure this machine's step times with a model, for `plan` and for runs."""
    from batchpipe.commands.profile import profile_command

    click.echo(_json(profile_command(model_or_job, output, seconds)))


@main.group()
def predictor() -> None:
    """Train a predictor of completion lengths, or judge one."""


def _past_outputs(command: Any) -> Any:
    """Gives a command the SOURCE arguments, and the options that say how their prompts were made."""
    job_help = "Job with the model and input section (template, messages, system, ...) that prompts are made with."
    for option in (
        click.option("--length-column", help="Column of completion tokens, where SOURCE is no output of batchpipe."),
        click.option("--prompt-column", help="Column of the prompt, by default that of a job."),
        click.option("--model", help="Model that the prompts are for, as model.name of a job."),
        click.option("--job", "job_path", metavar="JOB", type=_PATH, help=job_help),
        click.argument("sources", metavar="SOURCE...", nargs=-1, required=True, type=_PATH),
    ):
        command = option(command)
    return command


@predictor.command()
@_past_outputs
@click.option("--output", required=True, type=_PATH, help="The predictor's file.")
def train(**options: Any) -> None:
    """Train on past outputs: output folders of batchpipe, Parquet or JSONL."""
    from batchpipe.commands.predictor import train_command

    click.echo(_json(train_command(**options)))


@predictor.command()
@click.argument("predictor", metavar="FILE", type=_PATH)
@_past_outputs
@click.option(
    "--max-tokens", type=click.IntRange(min=1), help="Longest completion; by default that of the longest row."
)
def evaluate(**options: Any) -> None:
    """Compare a predictor's FILE with past outputs."""
    from batchpipe.commands.predictor import evaluate_command

    click.echo(_json(evaluate_command(**options)))


@main.command()
@click.argument("folder", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON, with the last run's metrics.")
def status(folder: str, as_json: bool) -> None:
    """Print how far the job with output folder DIR is."""
    from batchpipe.commands.status import describe_status, status_of

    found = status_of(folder)
    click.echo(_json(found) if as_json else describe_status(found))


@main.command()
@click.argument("folder", metavar="DIR")
@click.option("--format", "form", required=True, type=click.Choice(["openai-batch", "jsonl", "csv"]))
@click.option("--output", type=_PATH, help="Folder for the two files; by default DIR/_export/FORMAT.")
def export(folder: str, form: str, output: Path | None) -> None:
    """Write the completions of DIR as results and errors, a file each, in the order of the input."""
    from batchpipe.commands.export import export_command

    click.echo(_json(export_command(folder, form, output)))


@main.command()
@click.argument("folder", metavar="DIR")
@click.option("--output", type=_PATH, help="The page's file; by default DIR/_report.html.")
def report(folder: str, output: Path | None) -> None:
    """Write a page about the completions and runs of DIR: counts, lengths, errors, speed and memory over time."""
    from batchpipe.commands.report import report_command

    click.echo(_json(report_command(folder, output)))


@main.command()
def schema() -> None:
    """Print the JSON Schema of a job file."""
    from batchpipe.job import job_schema

    click.echo(json.dumps(job_schema(), indent=2))


@main.command()
@click.pass_context
def doctor(context: click.Context) -> None:
    """Tell what this machine offers, and what is missing."""
    from batchpipe.commands.doctor import examine

    findings = examine()
    for finding in findings:
        click.echo(finding.line, err=True)
    click.echo(_json({finding.name: finding.data for finding in findings}))
    context.exit(int(any(finding.is_broken for finding in findings)))


def entry() -> None:
    """The installed command, and `python -m batchpipe`."""
    main(prog_name="batchpipe", obj=OWN_PROCESS)


if __name__ == "__main__":  # python -m batchpipe.cli
    entry()
