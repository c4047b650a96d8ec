"""A row's conversation, checked and brought to the form that chat templates take."""

from __future__ import annotations

from typing import Any, NoReturn

from batchpipe.errors import RowError
from batchpipe.types import ErrorCode

Message = dict[str, Any]

COMMON_ROLES = frozenset(["system", "user", "assistant"])  # what every chat template has a form for, or refuses


def checked_messages(value: Any, column: str) -> list[Message]:
    """The messages of a list of {role, content}; RowError (MISSING_PROMPT, INVALID_MESSAGES) where it is none.

    Content given in parts must be text; the parts are joined by line ends. Null fields, which Arrow puts where another
    row has a value, are left out; only a message of tool calls may have no content.
    """
    if value is None:
        raise RowError(ErrorCode.MISSING_PROMPT, f"column {column!r} is missing or null")
    if not isinstance(value, list):
        _refuse(f"column {column!r} holds a {type(value).__name__}, not a list of {{role, content}}")
    if not value:
        _refuse(f"column {column!r} holds no messages")
    return [_checked(message, number) for number, message in enumerate(value, 1)]


def _checked(message: Any, number: int) -> Message:
    if not isinstance(message, dict):
        _refuse(f"message {number} is a {type(message).__name__}, not {{role, content}}")
    if not isinstance(message.get("role"), str):
        _refuse(f"message {number} has no role")
    kept = {name: value for name, value in message.items() if value is not None}
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_part_text(part, number) for part in content)
    if content is None and not kept.get("tool_calls"):
        _refuse(f"message {number} ({kept['role']}) has no content")
    if content is not None and not isinstance(content, str):
        _refuse(f"the content of message {number} is a {type(content).__name__}, not text")
    return {**kept, "content": content}


def _part_text(part: Any, number: int) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        _refuse(f"message {number} has a content part of type {kind!r}; only text can be read")
    text: str = part["text"]
    return text


def _refuse(message: str) -> NoReturn:
    raise RowError(ErrorCode.INVALID_MESSAGES, message)
