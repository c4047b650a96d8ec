"""`batchpipe predictor`: from past completions to a file to how good it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pytest
from safetensors.numpy import save_file

from batchpipe.commands.predictor import evaluate_command, train_command
from batchpipe.errors import InputError, JobError
from batchpipe.job import load_job
from batchpipe.runner.prepare import prepare
from batchpipe.runner.start import run_job
from batchpipe.training.examples import read_examples
from batchpipe.types import Request
from tests.runner.test_run import good_rows, job_of, open_fake
from tests.tiny_tokenizer import build_tiny_tokenizer


class Columns(TypedDict):
    prompt_column: str | None
    length_column: str | None


COLUMNS = Columns(prompt_column="prompt", length_column=None)
NO_COLUMNS = Columns(prompt_column=None, length_column=None)


def write_rows(path: Path, seed: int) -> Path:
    draw = np.random.default_rng(seed)
    lines = []
    for _ in range(400):
        is_long = draw.random() < 0.5
        words = draw.choice(["dog", "fox", "over", "lazy", "quick"], 6).tolist()
        prompt = " ".join([*words, "an essay" if is_long else "one word"])
        lines.append(json.dumps({"prompt": prompt, "out_tok": int(draw.integers(100, 300) if is_long else 1)}))
    path.write_text("\n".join(lines))
    return path


def test_train_then_evaluate(tmp_path: Path) -> None:
    model = build_tiny_tokenizer(tmp_path / "model")
    (model / "config.json").write_text('{"model_type": "llama"}')
    save_file({"x": np.zeros(1)}, model / "model.safetensors")  # its weights are never read
    output = tmp_path / "trained.safetensors"
    trained = train_command([write_rows(tmp_path / "past.jsonl", 1)], str(model), output, **COLUMNS)
    assert trained["rows"] == 400 and trained["rows_cut"] == 0 and output.is_file()
    other = write_rows(tmp_path / "other.jsonl", 2)
    result = evaluate_command(output, [other], str(model), max_tokens=None, **COLUMNS)
    assert json.loads(json.dumps(result)) == result
    assert result["num_rows"] == 400 and result["accuracy"] > 0.6 and abs(result["bias"]) < 0.15
    limited = evaluate_command(output, [other], str(model), max_tokens=10, **COLUMNS)
    assert limited["mean_absolute_error_tokens"] < 2.5  # 1 or 10 tokens; the mean of both is 4.5 off


def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    for output in (tmp_path / "missing" / "file", tmp_path):
        with pytest.raises(JobError, match="--output"):
            train_command([tmp_path / "none"], "none", output, prompt_column="prompt", length_column=None)


def conversations(count: int) -> list[Any]:
    return [
        {"id": str(i), "messages": [{"role": "user", "content": f"tell me of {i}"}], "topic": i} for i in range(count)
    ]


@pytest.mark.parametrize(
    ("rows", "section"),
    [
        (good_rows(120), {"template": "{topic} of {prompt}", "system": "be quick"}),
        (conversations(120), {"messages_column": "messages", "system": "be lazy"}),
        (good_rows(120), {"chat_template": "none"}),
    ],
)
def test_with_a_job_prompts_are_what_its_run_makes_of_them(
    tmp_path: Path, rows: list[Any], section: dict[str, Any]
) -> None:
    job_path = tmp_path / "job.yaml"
    job_path.write_text(json.dumps(job_of(tmp_path, rows, input=section)))
    run_job(job_path, open_pipelines=open_fake)
    job = load_job(job_path)
    prepared = prepare(job)
    asked = [request.prompt_token_ids.tolist() for request in prepared.requests() if isinstance(request, Request)]
    examples = read_examples([tmp_path / "output"], prepared.tokenizer, job.input)
    assert sorted(prompt.tolist() for prompt in examples.prompts) == sorted(asked)  # parts are in order of completion

    output = tmp_path / "trained.safetensors"
    trained = train_command([tmp_path / "output"], None, output, job_path=job_path, **NO_COLUMNS)
    assert trained["rows"] == 120
    found = evaluate_command(output, [tmp_path / "output"], None, max_tokens=None, job_path=job_path, **NO_COLUMNS)
    assert found["num_rows"] == 120 and abs(found["bias"]) < 0.1


def test_a_column_that_the_job_needs_and_the_source_lacks_is_named(tmp_path: Path) -> None:
    job_path = tmp_path / "job.yaml"
    job = job_of(tmp_path, good_rows(5), input={"template": "{topic} of {prompt}"}, output={"columns": ["prompt"]})
    job_path.write_text(json.dumps(job))
    run_job(job_path, open_pipelines=open_fake)
    with pytest.raises(InputError, match=r"part-.*\.parquet has no column 'topic'"):
        train_command([tmp_path / "output"], None, tmp_path / "trained", job_path=job_path, **NO_COLUMNS)


def test_model_and_job_are_one_or_the_other(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="--model"):
        train_command([tmp_path], None, tmp_path / "trained", **NO_COLUMNS)
    for model, prompt_column in (("tiny", None), (None, "prompt")):
        with pytest.raises(JobError, match="--job: .*job.yaml brings"):
            train_command(
                [tmp_path],
                model,
                tmp_path / "trained",
                prompt_column=prompt_column,
                length_column=None,
                job_path=tmp_path / "job.yaml",
            )
