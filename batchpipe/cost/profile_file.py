"""A YAML file that holds one strict section: every mistake is told by file and key."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from batchpipe.errors import JobError
from batchpipe.job.explain import explain, shown
from batchpipe.job.strict_yaml import read_yaml_file
from batchpipe.job.values import Section

S = TypeVar("S", bound=Section)


def load_section(path: Path, section: type[S]) -> S:
    """The checked contents of the file. Raises JobError with a line for each wrong key."""
    data = read_yaml_file(path)
    if not isinstance(data, Mapping):
        raise JobError(f"{path}: holds {shown(data)}; it must be a mapping of {', '.join(section.model_fields)}")
    try:
        return section.model_validate(data)
    except ValidationError as error:
        lines = explain(error, section, data)
        raise JobError("\n  ".join([f"{path}: cannot be used as it is:", *lines])) from None
