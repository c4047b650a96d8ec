"""`batchpipe export`: the completions of an output folder as OpenAI batch lines, JSON lines or CSV."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from batchpipe.errors import OutputError
from batchpipe.export.files import write_lines
from batchpipe.export.openai_lines import COLUMNS, Answers
from batchpipe.export.parts import Completions, open_completions
from batchpipe.export.plain_lines import csv_header, csv_lines, json_lines
from batchpipe.job import load_job
from batchpipe.model.resolve import resolve_model
from batchpipe.model.tokenizer import Tokenizer, load_tokenizer
from batchpipe.write.commit import IDENTITY_KEY
from batchpipe.write.folder import COMPLETIONS, STATE, SUCCESS

EXPORTS = "_export"  # the underscore keeps readers of the output folder from it

logger = logging.getLogger(__name__)


def export_command(folder: Path, form: str, output: Path | None = None) -> dict[str, Any]:
    """Writes `form` (`openai-batch`, `jsonl` or `csv`) to `output`, by default a folder of the output folder's own.

    There an earlier export is replaced. Raises OutputError if there is nothing to export or it cannot be written,
    ModelError if log probabilities need the model's tokenizer and it cannot be loaded.
    """
    completions = open_completions(folder)
    finished = (folder / SUCCESS).exists()
    if not finished:
        logger.warning("%s: the job is not finished; what is committed so far is exported", folder)
    target = output or folder / EXPORTS / form
    if target.resolve().is_relative_to((folder / COMPLETIONS).resolve()):
        raise OutputError(f"{target}: readers of the completions would take it for one; choose another folder.")
    replace = output is None
    if form == "csv":
        header = csv_header(completions.schema.names)
        written = write_lines(csv_lines(completions.rows()), target, ".csv", header=header, replace=replace)
    elif form == "jsonl":
        written = write_lines(json_lines(completions.rows()), target, ".jsonl", replace=replace)
    else:
        lines = _answers(folder, completions).lines(completions.rows(COLUMNS))
        written = write_lines(lines, target, ".jsonl", replace=replace)
    return {
        "path": str(folder),
        "format": form,
        "results": str(written.results),
        "errors": str(written.errors),
        "num_results": written.num_results,
        "num_errors": written.num_errors,
        "finished": finished,
    }


def _answers(folder: Path, completions: Completions) -> Answers:
    metadata = completions.metadata
    return Answers(
        model=metadata[b"batchpipe.model"].decode(),
        created=int((folder / STATE / "identity.json").stat().st_mtime),  # when the job began
        identity=metadata[IDENTITY_KEY.encode()].decode(),
        open_tokenizer=lambda: _tokenizer(folder),
    )


def _tokenizer(folder: Path) -> Tokenizer:
    model = load_job(folder / STATE / "job.yaml").model
    resolved = resolve_model(model, needs_weights=False)
    return load_tokenizer(resolved.folder, trust_remote_code=model.trust_remote_code)
