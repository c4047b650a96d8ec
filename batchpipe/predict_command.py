"""`batchpipe predictor`: trains a predictor on past completions, and says how good one is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from batchpipe.errors import JobError
from batchpipe.job.spec import ModelSpec
from batchpipe.model.resolve import resolve_model
from batchpipe.predict.examples import Examples, read_examples
from batchpipe.predict.trained_file import load_classifier, save_classifier, tokenizer_fingerprint
from batchpipe.tokenizer import Tokenizer, load_tokenizer

_SEED = 0


def train_command(
    sources: Sequence[Path], model: str, output: Path, *, prompt_column: str, length_column: str | None
) -> dict[str, Any]:
    """Writes the predictor's file `output`; returns the closing JSON line. Raises JobError before it reads anything
    where the file could not be written, and what `read_examples` and `train` raise."""
    from batchpipe.predict.train import train  # scikit-learn takes seconds to import

    if not output.parent.is_dir() or output.is_dir():
        raise JobError(f"--output: {output} cannot be a file: its folder is missing, or it is a folder itself")
    tokenizer, examples = _read(sources, model, prompt_column, length_column)
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
    model: str,
    *,
    prompt_column: str,
    length_column: str | None,
    max_tokens: int | None,
) -> dict[str, Any]:
    """The closing JSON line: the fields of `predict.evaluate.Evaluation`. `max_tokens` None is the longest row's."""
    from batchpipe.predict.evaluate import evaluate

    tokenizer, examples = _read(sources, model, prompt_column, length_column)
    classifier = load_classifier(predictor, tokenizer_fingerprint(tokenizer))
    limit_tokens = int(examples.num_tokens.max()) if max_tokens is None else max_tokens
    return {"predictor": str(predictor), **asdict(evaluate(classifier, examples, max_tokens=limit_tokens, seed=_SEED))}


def _read(
    sources: Sequence[Path], model: str, prompt_column: str, length_column: str | None
) -> tuple[Tokenizer, Examples]:
    tokenizer = load_tokenizer(resolve_model(ModelSpec(name=model)).folder)
    return tokenizer, read_examples(sources, tokenizer, prompt_column=prompt_column, length_column=length_column)
