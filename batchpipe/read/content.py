"""The conversation that a row brings, in whatever layout, as messages of {role, content}, checked."""

from __future__ import annotations

from typing import Any, NoReturn

import orjson

from batchpipe.errors import RowError
from batchpipe.read.nulls import without_nulls
from batchpipe.types import ErrorCode

Message = dict[str, Any]

COMMON_ROLES = frozenset(["system", "user", "assistant"])  # a chat template either has a form for these or refuses them

# The names of ShareGPT's `from`, in the layouts that data sets use; any other is a role as it stands.
_CALL = "function_call"
_SPEAKERS = {
    **dict.fromkeys(["human", "user", "prompter"], "user"),
    **dict.fromkeys(["gpt", "chatgpt", "assistant", "model", "bot", "ai", "bing", "bard", _CALL], "assistant"),
    **dict.fromkeys(["tool", "observation", "function", "function_response"], "tool"),
    "system": "system",
}


def checked_messages(value: Any, column: str) -> list[Message]:
    """The messages of a list of {role, content}; RowError (MISSING_PROMPT, INVALID_MESSAGES) if `value` is none.

    It may also come as ShareGPT's {from, value}, as {input, output} of each exchange, as JSON text, as a struct of
    lists (`datasets`' Sequence of a struct), as a list of maps or as one message alone. Content given in parts must be
    text, and the parts are joined by line ends. Null fields are left out at any depth; only a message of tool calls may
    lack content. Arguments of a tool call that are a JSON object as text, as in OpenAI's form, become that object.
    """
    if value is None:
        raise RowError(ErrorCode.MISSING_PROMPT, f"column {column!r} is missing or null")
    value = _as_list(value)
    if isinstance(value, str):
        hint = f"write `prompt_column: {column}` under `input` if it holds prompts of plain text"
        _refuse(f"column {column!r} holds a str, not a list of {{role, content}}; {hint}")
    if isinstance(value, list) and value and all(map(_is_exchange, value)):
        turns = (("user", "input"), ("assistant", "output"))
        value = [{"role": role, "content": exchange[name]} for exchange in value for role, name in turns]
    if not isinstance(value, list):
        _refuse(f"column {column!r} holds a {type(value).__name__}, not a list of {{role, content}}")
    if not value:
        _refuse(f"column {column!r} holds no messages")
    return [_checked(message, number) for number, message in enumerate(value, 1)]


def _is_exchange(item: Any) -> bool:
    """Whether the item is a question with its answer, {input, output}."""
    return isinstance(item, dict) and "input" in item and "output" in item and not {"role", "from"} & item.keys()


def without_last_answer(messages: list[Message]) -> list[Message]:
    """The conversation up to the last turn that is not the assistant's; RowError if nobody asks anything."""
    count = len(messages)
    while count and messages[count - 1]["role"] == "assistant":
        count -= 1
    if all(message["role"] == "system" for message in messages[:count]):
        _refuse("without its last answer the conversation asks nothing (input.last_answer is drop)")
    return messages[:count]


def _as_list(value: Any) -> Any:
    """A conversation that is JSON text, a struct of lists or one message, as the list it stands for; else `value`."""
    if isinstance(value, str):
        value = _parsed(value)
    if not isinstance(value, dict):
        return value
    if isinstance(value.get("role", value.get("from")), str):
        return [value]
    columns = {name: items for name, items in value.items() if items is not None}
    lengths = {len(items) if isinstance(items, list) else None for items in columns.values()}
    if len(lengths) != 1 or None in lengths:
        return value
    return [dict(zip(columns, items, strict=True)) for items in zip(*columns.values(), strict=True)]


def _parsed(text: str) -> Any:
    """What `text` is as JSON; itself if it is none."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def _checked(message: Any, number: int) -> Message:
    kept = without_nulls(message)
    if not isinstance(kept, dict):
        _refuse(f"message {number} is a {type(message).__name__}, not {{role, content}}")
    fields = ", ".join(map(repr, kept)) or "no fields"
    kept = _with_our_names(kept)
    role, content = kept.get("role"), kept.get("content")
    if not isinstance(role, str):
        _refuse(f"message {number} has no role; it has {fields}")
    if isinstance(content, list):
        content = "\n".join(_part_text(part, number) for part in content)
    if content is None and not kept.get("tool_calls"):
        _refuse(f"message {number} ({role}) has no content")
    if content is not None and not isinstance(content, str):
        _refuse(f"the content of message {number} is a {type(content).__name__}, not text")
    return {**kept, "content": content}


def _with_our_names(message: Message) -> Message:
    """{role, content, tool_calls} of a message in ShareGPT's form, or with OpenAI's older `function_call`."""
    named = dict(message)
    if "role" not in named and isinstance(speaker := named.pop("from", None), str):
        name = speaker.strip().lower()
        named["role"] = _SPEAKERS.get(name, speaker)
        if name == _CALL and (calls := _calls(named.get("value"))):
            del named["value"]
            named["tool_calls"] = calls
    if "content" not in named and "value" in named:
        named["content"] = named.pop("value")
    calls = named.pop("tool_calls", None) or _calls(named.pop(_CALL, None))
    calls = _parsed(calls) if isinstance(calls, str) else calls
    if calls:  # an empty list, such as pandas writes, would make some templates open a list of calls
        named["tool_calls"] = list(map(_with_object_arguments, calls)) if isinstance(calls, list) else calls
    return named


def _calls(value: Any) -> list[Any]:
    """The tool calls of {name, arguments}, of a list of these, or of such as JSON text; [] if `value` is none."""
    found = _parsed(value) if isinstance(value, str) else value
    functions = found if isinstance(found, list) else [found]
    if not all(isinstance(function, dict) and "name" in function for function in functions):
        return []
    return [{"type": "function", "function": function} for function in functions]


def _with_object_arguments(call: Any) -> Any:
    """Chat templates expect an object, and would write a text as a quoted, escaped one."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_object_arguments(call["function"])}
    given = call.get("arguments")
    arguments = _parsed(given) if isinstance(given, str) else given
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _part_text(part: Any, number: int) -> str:
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        _refuse(f"message {number} has a content part of type {kind!r}; only text can be read")
    return str(part["text"])


def _refuse(message: str) -> NoReturn:
    raise RowError(ErrorCode.INVALID_MESSAGES, message)
