"""Loading a job: reads the file, fills in environment variables, applies overrides, checks everything."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from batchpipe.errors import JobError
from batchpipe.job.explain import explain, key_paths, section_of, shown, unknown_key
from batchpipe.job.spec import PREDICT_METHODS, Job
from batchpipe.job.strict_yaml import read_yaml, read_yaml_file

Overrides = Mapping[str, Any] | Sequence[str]

_ENVIRONMENT_VARIABLE = re.compile(r"\$\{env:([^}]*)\}")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")
# The keys that hold paths, with the values that are none.
_PATH_WORDS: Mapping[str, Sequence[str]] = {
    "model.name": (),
    "input.path": (),
    "input.chat_template": ("auto", "none"),
    "predict.method": PREDICT_METHODS,
    "output.path": (),
}


def load_job(source: str | Path | Mapping[str, Any] | Job, overrides: Overrides = ()) -> Job:
    """The checked job of `source`, with absolute local paths.

    `source` is a job file's path, a mapping of the same shape, or a Job. `overrides` replace its keys: strings
    "section.key=<YAML>", or a mapping of dotted keys to values. Relative paths are relative to the job file's folder,
    those of `overrides`, or where there is no file, to the working folder. Raises JobError, a line for each mistake.
    """
    mistakes: list[str] = []
    origin, folder = "job", Path.cwd()
    if isinstance(source, Job):
        data = source.model_dump(exclude_unset=True)  # what is not set stays known as not set
    elif isinstance(source, Mapping):
        data = _expanded(source, mistakes)
    else:
        path = Path(source)
        origin, folder = str(path), path.absolute().parent
        data = {"name": path.stem, **_expanded(_read(path), mistakes)}
    _override(data, overrides, mistakes)
    try:
        job = Job.model_validate(data)
    except ValidationError as error:
        mistakes += explain(error, Job, data)
    if mistakes:
        raise JobError("\n  ".join([f"{origin}: cannot be run as it is:", *mistakes]))
    return _with_absolute_paths(job, folder)


def job_schema() -> dict[str, Any]:
    """The JSON Schema of a job file."""
    return Job.model_json_schema()


def _read(path: Path) -> Mapping[str, Any]:
    data = read_yaml_file(path)
    if data is None:
        raise JobError(f"{path}: is empty; a job file needs at least model.name, input.path and output.path")
    if not isinstance(data, Mapping):
        raise JobError(f"{path}: holds {shown(data)}; a job file is a mapping of sections (model, input, output, ...)")
    return data


def _expanded(data: Mapping[str, Any], mistakes: list[str]) -> dict[str, Any]:
    """A copy of `data` in plain dicts, lists and strings, with each `${env:NAME}` replaced by its value.

    The reference to a variable that is not set stays as it is, and a line is added to `mistakes`.
    """

    def expand(value: Any, path: str) -> Any:
        if isinstance(value, Mapping):
            return {key: expand(inner, f"{path}.{key}" if path else str(key)) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [expand(inner, f"{path}.{place}") for place, inner in enumerate(value)]
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if not isinstance(value, str):
            return value
        for name in _ENVIRONMENT_VARIABLE.findall(value):
            if name not in os.environ:
                mistakes.append(f"{path}: {shown(value)}: the environment variable '{name}' is not set")
        return _ENVIRONMENT_VARIABLE.sub(lambda match: os.environ.get(match[1], match[0]), value)

    expanded: dict[str, Any] = expand(data, "")
    return expanded


def _override(data: dict[str, Any], overrides: Overrides, mistakes: list[str]) -> None:
    """Changes `data` by each override; a key that no job has adds a line to `mistakes`."""
    values = overrides if isinstance(overrides, Mapping) else dict(map(_parsed, overrides))
    for path, value in _expanded(values, mistakes).items():
        if wrong := _wrong_path(path):
            mistakes.append(f"override {wrong}")
            continue
        section, _, key = path.rpartition(".")
        keys = data.setdefault(section, {}) if section else data
        if isinstance(keys, dict):  # if not, the check of the whole job says so
            keys[key] = _absolute(path, value, Path.cwd()) if path in _PATH_WORDS else value


def _parsed(assignment: str) -> tuple[str, Any]:
    path, equals, text = assignment.partition("=")
    if not equals:
        raise JobError(f"override {assignment!r}: is not of the form section.key=value")
    return path.strip(), read_yaml(text, f"override {assignment!r}")


def _wrong_path(path: str) -> str | None:
    """What is wrong with a dotted key; None if a job has it."""
    known = key_paths(Job)
    if path in known:
        return None
    first, _, rest = path.partition(".")
    section = section_of(Job, first)
    if section is None:
        return f"{path}: {first} is not a section" if first in known else unknown_key((), path, known, known)
    if not rest:
        return f"{path}: is a section; set its keys, such as {path}.{next(iter(section.model_fields))}"
    key = rest.partition(".")[0]
    if key in section.model_fields:
        return f"{path}: {first}.{key} is not a section"
    return unknown_key((first,), rest, section.model_fields, known)


def _with_absolute_paths(job: Job, folder: Path) -> Job:
    changed: dict[str, dict[str, Any]] = {}
    for path in _PATH_WORDS:
        section, _, key = path.partition(".")
        changed.setdefault(section, {})[key] = _absolute(path, getattr(getattr(job, section), key), folder)
    return job.model_copy(update={key: getattr(job, key).model_copy(update=keys) for key, keys in changed.items()})


def _absolute(key: str, value: Any, folder: Path) -> Any:
    """The value of a key of `_PATH_WORDS` with relative paths taken from `folder`; what is no path stays as it is."""
    if isinstance(value, list | tuple):
        return tuple(_absolute(key, one, folder) for one in value)
    if not isinstance(value, str) or not value or value in _PATH_WORDS[key] or _ADDRESS.match(value):
        return value
    if key == "model.name":  # else it is an alias or a hub id
        is_path = value.startswith((".", "/", "~")) or value.endswith(".gguf") or (folder / value).exists()
        if not is_path:
            return value
    return os.path.abspath(folder / Path(value).expanduser())
