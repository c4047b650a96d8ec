"""`batchpipe predictor`: trains a predictor on past completions, and says how good one is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from batchpipe.errors import JobError
from batchpipe.job import load_job
from batchpipe.job.spec import InputSpec, ModelSpec
from batchpipe.model.resolve import resolve_model
from batchpipe.model.tokenizer import Tokenizer, load_tokenizer
from batchpipe.predict.trained_file import load_classifier, save_classifier, tokenizer_fingerprint
from batchpipe.training.examples import Examples, read_examples

_SEED = 0


def train_command(
    sources: Sequence[Path],
    model: str | None,
    output: Path,
    *,
    prompt_column: str | None,
    length_column: str | None,
    job_path: Path | None = None,
) -> dict[str, Any]:
    """Writes the predictor's file `output`; returns the closing JSON line.

    Prompts are `prompt_column` as one user message of `model`, or what the job of `job_path` makes of the sources'
    columns with its model. Raises JobError before it reads anything where the file could not be written, or where both
    are given or neither, and what `read_examples` and `train` raise.
    """
    from batchpipe.training.train import train  # scikit-learn takes seconds to import

    if not output.parent.is_dir() or output.is_dir():
        raise JobError(f"--output: {output} cannot be a file: its folder is missing, or it is a folder itself")
    tokenizer, examples = _read(sources, model, prompt_column, length_column, job_path)
    classifier = train(examples, seed=_SEED)
    save_classifier(output, classifier, tokenizer_fingerprint(tokenizer))
    return {
        "predictor": str(output),
        "rows": len(examples),
        "rows_cut": int((~examples.ended).sum()),
        "features": len(classifier.model.features),
        "quantile_edges_tokens": classifier.edges_tokens.tolist(),
    }


def evaluate_command(
    predictor: Path,
    sources: Sequence[Path],
    model: str | None,
    *,
    prompt_column: str | None,
    length_column: str | None,
    max_tokens: int | None,
    job_path: Path | None = None,
) -> dict[str, Any]:
    """The closing JSON line: the fields of `predict.evaluate.Evaluation`. `max_tokens` None is the longest row's.

    Prompts are made as in `train_command`.
    """
    from batchpipe.training.evaluate import evaluate

    tokenizer, examples = _read(sources, model, prompt_column, length_column, job_path)
    classifier = load_classifier(predictor, tokenizer_fingerprint(tokenizer))
    limit_tokens = int(examples.num_tokens.max()) if max_tokens is None else max_tokens
    return {"predictor": str(predictor), **asdict(evaluate(classifier, examples, max_tokens=limit_tokens, seed=_SEED))}


def _read(
    sources: Sequence[Path],
    model: str | None,
    prompt_column: str | None,
    length_column: str | None,
    job_path: Path | None,
) -> tuple[Tokenizer, Examples]:
    model_spec, input_spec = _rendering(sources, model, prompt_column, job_path)
    folder = resolve_model(model_spec).folder
    tokenizer = load_tokenizer(folder, trust_remote_code=model_spec.trust_remote_code)
    return tokenizer, read_examples(sources, tokenizer, input_spec, length_column=length_column)


def _rendering(
    sources: Sequence[Path], model: str | None, prompt_column: str | None, job_path: Path | None
) -> tuple[ModelSpec, InputSpec]:
    """The model that prompts are written for, and how."""
    if job_path is not None:
        if model is not None or prompt_column is not None:
            raise JobError(f"--job: {job_path} brings its own model and prompts; leave out --model and --prompt-column")
        job = load_job(job_path)
        return job.model, job.input
    if model is None:
        raise JobError("--model: nothing says which model the prompts are for; give --model or --job")
    input_spec = InputSpec(path=tuple(map(str, sources)))
    if prompt_column is not None:
        input_spec = input_spec.model_copy(update={"prompt_column": prompt_column})
    return ModelSpec(name=model), input_spec
