"""The job's prompt template: text with {column} places, by name only, so that row data can reach nothing else."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from batchpipe.errors import JobError, RowError
from batchpipe.types import ErrorCode


class PromptTemplate:
    """`{name}` is the row's column, `{{` and `}}` are braces. JobError where `text` asks for more than a name."""

    def __init__(self, text: str) -> None:
        try:
            pieces = list(string.Formatter().parse(text))
        except ValueError as error:
            raise JobError(f"input.template: {error}; write {{{{ and }}}} for braces that are text") from error
        self._pieces: list[tuple[str, str | None]] = []
        for literal, name, layout, conversion in pieces:
            if name is not None:
                _check_name(name, layout, conversion)
            self._pieces.append((literal, name))
        self.columns = frozenset(name for _, name in self._pieces if name is not None)
        if not self.columns:
            raise JobError("input.template: names no column, so every prompt would be the same; write {column}")

    def fill(self, values: Mapping[str, Any]) -> str:
        """The text with the row's values in place, braces in them left as they are."""
        return "".join(
            literal if name is None else literal + _as_text(name, values.get(name)) for literal, name in self._pieces
        )


def _check_name(name: str, layout: str | None, conversion: str | None) -> None:
    is_plain = name != "" and not name.isdigit() and not any(mark in name for mark in ".[]")
    if not is_plain or layout or conversion:
        place = name + (f"!{conversion}" if conversion else "") + (f":{layout}" if layout else "")
        raise JobError(f"input.template: {{{place}}} is more than the name of a column, such as {{question}}")


def _as_text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        raise RowError(ErrorCode.MISSING_PROMPT, f"column {name!r} of input.template is missing or null")
    if isinstance(value, list | dict | bytes):
        kind = type(value).__name__
        raise RowError(ErrorCode.WRONG_TYPE, f"column {name!r} of input.template holds a {kind}, not text")
    return str(value)
