"""Conversations in the layouts that data sets have become the same messages."""

from __future__ import annotations

import json
from typing import Any

import pytest

from batchpipe.errors import RowError
from batchpipe.read.content import checked_messages, without_last_answer
from batchpipe.types import ErrorCode

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
]
NAMES = {"system": "system", "user": "human", "assistant": "gpt"}
SPOKEN = [{"from": NAMES[message["role"]], "value": message["content"]} for message in CHAT]


@pytest.mark.parametrize(
    "given",
    [
        CHAT,
        SPOKEN,
        json.dumps(SPOKEN),
        [{**turn, "role": None, "content": None} for turn in SPOKEN],
        [list(turn.items()) + [("name", None)] for turn in SPOKEN],
        {name: [turn[name] for turn in SPOKEN] for name in ("from", "value")} | {"weight": None},
        [
            {"from": "system", "content": "Be brief."},
            {"role": "user", "value": "hi"},
            {"from": " ChatGPT", "value": "hello"},
        ],
    ],
)
def test_every_layout_gives_the_same_messages(given: Any) -> None:
    assert checked_messages(given, "chat") == CHAT


def test_one_message_alone() -> None:
    assert checked_messages(CHAT[1], "chat") == checked_messages(SPOKEN[1], "chat") == [CHAT[1]]


def test_a_speaker_of_another_name_keeps_it_as_its_role() -> None:
    given = [{"from": "observation", "value": "42"}, {"from": "Critic", "value": "no"}]
    assert [message["role"] for message in checked_messages(given, "chat")] == ["tool", "Critic"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([{"from": 3, "value": "x"}], "message 1 has no role; it has 'from', 'value'"),
        ([{"speaker": "x", "text": "y"}], "message 1 has no role; it has 'speaker', 'text'"),
        ([{}], "message 1 has no role; it has no fields"),
        ([{"from": "human", "value": None}], r"message 1 (user) has no content"),
        ({"role": ["user"], "content": []}, "column 'chat' holds a dict, not a list"),
        ({"topic": "x"}, "column 'chat' holds a dict, not a list"),
        ("3", "column 'chat' holds a int, not a list"),
        ("hi", "write `prompt_column: chat` under `input` if it holds prompts of plain text"),
    ],
)
def test_what_is_no_conversation(value: Any, words: str) -> None:
    with pytest.raises(RowError) as caught:
        checked_messages(value, "chat")
    assert caught.value.code == ErrorCode.INVALID_MESSAGES
    assert words in caught.value.message


class TestToolCalls:
    @staticmethod
    def call(arguments: object, **more: object) -> list[dict[str, object]]:
        function = {"name": "add", "arguments": arguments, **more}
        return [{"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}]

    @pytest.mark.parametrize(
        ("given", "read"),
        [
            ('{"a": 1, "b": null}', {"a": 1, "b": None}),
            ({"a": {"c": 1, "d": None}, "b": None}, {"a": {"c": 1}}),
            ([("a", 1), ("b", None)], {"a": 1}),
            ("plain", "plain"),
            ("[1]", "[1]"),
        ],
    )
    def test_arguments_that_are_an_object_as_text_become_the_object(self, given: object, read: object) -> None:
        [message] = checked_messages(self.call(given, strict=None), "chat")
        assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": read}

    @pytest.mark.parametrize(
        "message",
        [
            {"role": "assistant", "function_call": {"name": "add", "arguments": '{"a": 1}'}},
            {"role": "assistant", "tool_calls": [], "function_call": {"name": "add", "arguments": {"a": 1}}},
            {"role": "assistant", "tool_calls": json.dumps(call({"a": 1})[0]["tool_calls"])},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "function_call", "value": '[{"name": "add", "arguments": "{\\"a\\": 1}"}]'},
        ],
    )
    def test_every_form_gives_the_same_call(self, message: dict[str, Any]) -> None:
        assert checked_messages([message], "chat") == checked_messages(self.call({"a": 1}), "chat")

    def test_a_call_that_is_no_json_is_what_the_assistant_says(self) -> None:
        [message] = checked_messages([{"from": "function_call", "value": "add(1)"}], "chat")
        assert message == {"role": "assistant", "content": "add(1)"}

    def test_an_empty_list_of_calls_is_none(self) -> None:
        assert checked_messages([{**CHAT[2], "tool_calls": []}], "chat") == [CHAT[2]]

    def test_calls_of_an_unknown_shape_are_kept(self) -> None:
        [message] = checked_messages([{"role": "assistant", "content": "", "tool_calls": ["add", {"x": 1}]}], "chat")
        assert message["tool_calls"] == ["add", {"x": 1}]


def test_the_last_answer_is_left_out() -> None:
    assert (
        without_last_answer(CHAT) == without_last_answer([*CHAT, CHAT[2]]) == without_last_answer(CHAT[:2]) == CHAT[:2]
    )
    assert without_last_answer([*CHAT, CHAT[1]]) == [*CHAT, CHAT[1]]
    for nothing_asked in ([CHAT[0], CHAT[2]], [CHAT[2]], [CHAT[0]]):
        with pytest.raises(RowError, match="without its last answer the conversation asks nothing"):
            without_last_answer(nothing_asked)
