"""`batchpipe predictor`: from past completions to a file to how good it is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from batchpipe.errors import JobError
from batchpipe.predict_command import evaluate_command, train_command
from tests.tiny_tokenizer import build_tiny_tokenizer


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
    columns = {"prompt_column": "prompt", "length_column": None}
    trained = train_command([write_rows(tmp_path / "past.jsonl", 1)], str(model), output, **columns)
    assert trained["rows"] == 400 and trained["rows_cut"] == 0 and output.is_file()
    other = write_rows(tmp_path / "other.jsonl", 2)
    result = evaluate_command(output, [other], str(model), max_tokens=None, **columns)
    assert json.loads(json.dumps(result)) == result
    assert result["num_rows"] == 400 and result["accuracy"] > 0.6 and abs(result["bias"]) < 0.15
    limited = evaluate_command(output, [other], str(model), max_tokens=10, **columns)
    assert limited["mean_absolute_error_tokens"] < 2.5  # 1 or 10 tokens; the mean of both is 4.5 off


def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    for output in (tmp_path / "missing" / "file", tmp_path):
        with pytest.raises(JobError, match="--output"):
            train_command([tmp_path / "none"], "none", output, prompt_column="prompt", length_column=None)
