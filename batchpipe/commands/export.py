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
from batchpipe.job.strict_yaml import read_yaml
from batchpipe.model.resolve import resolve_model
from batchpipe.model.tokenizer import Tokenizer, load_tokenizer
from batchpipe.write.commit import IDENTITY_KEY
from batchpipe.write.place import COMPLETIONS, STATE, SUCCESS, Place, open_place

EXPORTS = "_export"  # the underscore keeps readers of the output folder from it

logger = logging.getLogger(__name__)


def export_command(folder: str | Path, form: str, output: Path | None = None) -> dict[str, Any]:
    """Writes `form` (`openai-batch`, `jsonl` or `csv`) to `output`, by default a folder of the output folder's own.

    There an earlier export is replaced. Raises OutputError if there is nothing to export or it cannot be written,
    ModelError if log probabilities need the model's tokenizer and it cannot be loaded.
    """
    place = open_place(folder)
    completions = open_completions(place)
    finished = place.size_bytes(SUCCESS) is not None
    if not finished:
        logger.warning("%s: the job is not finished; what is committed so far is exported", folder)
    if output is None and not place.is_local:
        raise OutputError(f"{folder}: exports are written to a disk; give a folder as --output.")
    target = output or Path(place.base, EXPORTS, form)
    if place.is_local and target.resolve().is_relative_to(Path(place.base, COMPLETIONS).resolve()):
        raise OutputError(f"{target}: readers of the completions would take it for one; choose another folder.")
    replace = output is None
    if form == "csv":
        header = csv_header(completions.schema.names)
        written = write_lines(csv_lines(completions.rows()), target, ".csv", header=header, replace=replace)
    elif form == "jsonl":
        written = write_lines(json_lines(completions.rows()), target, ".jsonl", replace=replace)
    else:
        lines = _answers(place, completions).lines(completions.rows(COLUMNS))
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


def _answers(place: Place, completions: Completions) -> Answers:
    metadata = completions.metadata
    return Answers(
        model=metadata[b"batchpipe.model"].decode(),
        created=place.modified_seconds(f"{STATE}/identity.json"),  # when the job began
        identity=metadata[IDENTITY_KEY.encode()].decode(),
        open_tokenizer=lambda: _tokenizer(place),
    )


def _tokenizer(place: Place) -> Tokenizer:
    model = load_job(read_yaml((place.read(f"{STATE}/job.yaml") or b"").decode(), place / f"{STATE}/job.yaml")).model
    resolved = resolve_model(model, needs_weights=False)
    return load_tokenizer(resolved.folder, trust_remote_code=model.trust_remote_code)
