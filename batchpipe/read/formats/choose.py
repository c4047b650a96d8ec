"""The format of the input's files, by their names, and which files of a folder are not rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import PurePosixPath

from batchpipe.errors import InputError
from batchpipe.read.files import InputFile

logger = logging.getLogger(__name__)

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".txt": "text",
}
# Beside rows of the first kinds, files of the later ones are seldom rows: settings, lists of names, licences.
_LIKELIHOODS = ({"jsonl", "parquet", "arrow"}, {"csv", "tsv", "json"}, {"text"})
_OF_DATASETS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # beside their rows
_NAMED_AT_MOST = 3  # files that a message lists


def choose_format(files: Sequence[InputFile], format_name: str) -> tuple[list[InputFile], str]:
    """The files with rows, and their format. `format_name` is input.format: a format, or auto.

    A folder or pattern may take in files of other kinds, such as the README of a repository: they are left out, with
    one line that names them, unless the job names the file itself. Raises InputError if the format cannot be told, or
    the files have several.
    """
    kinds = {file.path: _format_of(file) for file in files}
    wanted = {kind for kind in kinds.values() if kind is not None}
    if format_name == "auto":
        likely = next((wanted & group for group in _LIKELIHOODS if wanted & group), wanted)
        wanted = likely | {kind for file in files if file.named and (kind := kinds[file.path]) is not None}
    else:
        # A name that tells nothing is believed to have the job's format if no file has a name that tells it.
        wanted &= {"jsonl" if format_name == "openai-batch" else format_name}
        if not wanted:
            return list(files), format_name
    kept = [file for file in files if file.named or kinds[file.path] in wanted]
    if not kept or any(kinds[file.path] is None for file in kept if format_name == "auto"):
        path = next(path for path, kind in kinds.items() if kind is None)
        raise InputError(
            f"input.path: the format of {path} cannot be told from its name (known: {', '.join(FORMATS)}); "
            "set input.format, or name the input more narrowly"
        )
    if len(wanted) > 1:
        examples = {kinds[file.path]: file.path for file in kept}
        listed = ", ".join(f"{examples[kind]} is {kind}" for kind in sorted(wanted))
        raise InputError(f"input.path: files of several formats ({listed}); read one, such as folder/*.parquet")
    if left_out := [file.path for file in files if file not in kept]:
        more = f" and {len(left_out) - _NAMED_AT_MOST} more" if len(left_out) > _NAMED_AT_MOST else ""
        logger.warning(
            "input.path: left out, as no rows by their names: %s%s", ", ".join(left_out[:_NAMED_AT_MOST]), more
        )
    return kept, next(iter(wanted)) if format_name == "auto" else format_name


def _format_of(file: InputFile) -> str | None:
    name = PurePosixPath(file.path.lower().removesuffix(".gz").removesuffix(".zst"))
    return None if name.name in _OF_DATASETS and not file.named else FORMATS.get(name.suffix)
