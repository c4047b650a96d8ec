"""What a row says: the job's template filled with its columns, or its list of messages, checked.

A template has {column} places, by name only, so that the data of a row can reach nothing else.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any, NoReturn

import orjson

from batchpipe.errors import JobError, RowError
from batchpipe.read.nested import value_at
from batchpipe.types import ErrorCode

Message = dict[str, Any]

COMMON_ROLES = frozenset(["system", "user", "assistant"])  # a chat template either has a form for these or refuses them


class PromptTemplate:
    """`{name}` is the row's column, `{{` and `}}` are braces. JobError if `text` asks for more than a name."""

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
    is_plain = name != "" and not name.isdigit() and not any(mark in name for mark in "[]") and all(name.split("."))
    if not is_plain or layout or conversion:
        place = name + (f"!{conversion}" if conversion else "") + (f":{layout}" if layout else "")
        raise JobError(f"input.template: {{{place}}} is more than the name of a column, such as {{question}}")


def _as_text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None or value != value:  # pandas writes NaN for null
        raise RowError(ErrorCode.MISSING_PROMPT, f"column {name!r} of input.template is missing or null")
    if isinstance(value, list | dict | bytes):
        kind = type(value).__name__
        raise RowError(ErrorCode.WRONG_TYPE, f"column {name!r} of input.template holds a {kind}, not text")
    return str(value)


def checked_messages(value: Any, column: str) -> list[Message]:
    """The messages of a list of {role, content}; RowError (MISSING_PROMPT, INVALID_MESSAGES) if `value` is none.

    The list may also come as JSON text, as a struct of lists (`datasets`' Sequence of a struct) or as a list of maps.
    Content given in parts must be text, and the parts are joined by line ends. Null fields, with which Arrow fills a
    message that lacks a field of another row's message, are left out at any depth; only a message of tool calls may
    lack content. Arguments of a tool call that are a JSON object as text, as in OpenAI's form, become that object.
    """
    if value is None:
        raise RowError(ErrorCode.MISSING_PROMPT, f"column {column!r} is missing or null")
    value = _as_list(value)
    if not isinstance(value, list):
        _refuse(f"column {column!r} holds a {type(value).__name__}, not a list of {{role, content}}")
    if not value:
        _refuse(f"column {column!r} holds no messages")
    return [_checked(message, number) for number, message in enumerate(value, 1)]


def _as_list(value: Any) -> Any:
    """A conversation that is JSON text or a struct of lists, as the list that it stands for; else `value` itself."""
    if isinstance(value, str):
        try:
            return orjson.loads(value)
        except orjson.JSONDecodeError:
            return value
    columns = list(value.values()) if isinstance(value, dict) else []
    if not columns or not all(isinstance(items, list) and len(items) == len(columns[0]) for items in columns):
        return value
    return [dict(zip(value, items, strict=True)) for items in zip(*columns, strict=True)]


def _checked(message: Any, number: int) -> Message:
    if isinstance(message, list) and all(isinstance(pair, tuple) for pair in message):
        message = dict(message)  # an Arrow map
    if not isinstance(message, dict):
        _refuse(f"message {number} is a {type(message).__name__}, not {{role, content}}")
    if not isinstance(message.get("role"), str):
        _refuse(f"message {number} has no role")
    kept = _without_nulls(message)
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_part_text(part, number) for part in content)
    if content is None and not kept.get("tool_calls"):
        _refuse(f"message {number} ({kept['role']}) has no content")
    if content is not None and not isinstance(content, str):
        _refuse(f"the content of message {number} is a {type(content).__name__}, not text")
    if isinstance(kept.get("tool_calls"), list):
        kept["tool_calls"] = [_with_object_arguments(call) for call in kept["tool_calls"]]
    return {**kept, "content": content}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _with_object_arguments(call: Any) -> Any:
    """Chat templates expect an object, and would write a text as a quoted, escaped one."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = orjson.loads(function["arguments"])
    except orjson.JSONDecodeError:
        return call
    if not isinstance(arguments, dict):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _part_text(part: Any, number: int) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        _refuse(f"message {number} has a content part of type {kind!r}; only text can be read")
    return str(part["text"])


def _refuse(message: str) -> NoReturn:
    raise RowError(ErrorCode.INVALID_MESSAGES, message)
