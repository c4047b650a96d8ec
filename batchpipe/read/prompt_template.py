"""The job's `input.template`: text with {column} places, by name only, so that a row's data can reach nothing else.

A list is written one item a line, an object as JSON, and so are items of a list that are no text.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from functools import partial
from typing import Any

from batchpipe.errors import JobError, RowError
from batchpipe.read.nested import value_at
from batchpipe.types import ErrorCode


class PromptTemplate:
    """`{name}` is the row's column, `{{` and `}}` are braces. JobError if `text` asks for more than a name.

    A name with dots, as in `{answers.text}`, is a field inside a column.
    """

    def __init__(self, text: str) -> None:
        try:
            pieces = list(string.Formatter().parse(text))
        except ValueError as error:
            raise JobError(f"input.template: {error}; write {{{{ and }}}} for braces that are text") from error
        for _, name, layout, conversion in pieces:
            if name is not None:
                _check_name(name, layout, conversion)
        self._pieces = [(literal, name) for literal, name, *_ in pieces]
        self.columns = frozenset(name for _, name in self._pieces if name is not None)
        if not self.columns:
            raise JobError("input.template: names no column, so every prompt would be the same; write {column}")

    def fill(self, values: Mapping[str, Any]) -> str:
        """The text with the row's values at their places; braces inside values are left as they are."""
        return "".join(
            literal if name is None else literal + _as_text(name, value_at(values, name))
            for literal, name in self._pieces
        )


def _check_name(name: str, layout: str | None, conversion: str | None) -> None:
    is_plain = all(name.split(".")) and not name.isdigit() and not any(mark in name for mark in "[]")
    if not is_plain or layout or conversion:
        place = name + (f"!{conversion}" if conversion else "") + (f":{layout}" if layout else "")
        raise JobError(f"input.template: {{{place}}} is more than the name of a column, such as {{question}}")


def _as_text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None or value != value:  # pandas writes NaN for null
        raise RowError(ErrorCode.MISSING_PROMPT, f"column {name!r} of input.template is missing or null")
    if isinstance(value, list):
        return "\n".join(item if isinstance(item, str) else _as_json(name, item) for item in value)
    return _as_json(name, value) if isinstance(value, dict) else _plain_text(name, value)


def _as_json(name: str, value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=partial(_plain_text, name))


def _plain_text(name: str, value: Any) -> str:
    """Of a value that is no text, list or object: a number, a date, ...; inside JSON, of what JSON has no form for."""
    if isinstance(value, bytes):
        raise RowError(ErrorCode.WRONG_TYPE, f"column {name!r} of input.template holds bytes, not text")
    return str(value)
