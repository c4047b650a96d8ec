"""Prompts of OpenAI's requests: chats through the template, completions as they stand, both in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batchpipe.errors import RowError
from batchpipe.job.spec import InputSpec
from batchpipe.model.tokenizer import Tokenizer, load_tokenizer
from batchpipe.read.openai_render import RequestRenderer
from batchpipe.types import ErrorCode
from tests.tiny_tokenizer import CHAT_TEMPLATE, build_tiny_tokenizer

TALK = {"messages": [{"role": "user", "content": "the dog"}]}


def tokenizer_of(tmp_path: Path, **keys: Any) -> Tokenizer:
    return load_tokenizer(build_tiny_tokenizer(tmp_path, adds_begin_token=True, **keys))


def token_ids(tokenizer: Tokenizer, values: dict[str, Any], **keys: Any) -> list[int]:
    renderer = RequestRenderer(InputSpec.model_validate({"path": "x", **keys}), tokenizer)
    prompt = renderer.render(values)
    return renderer.encode([prompt])[0] if isinstance(prompt, str) else prompt


def test_a_chat_goes_through_the_template_and_a_completion_does_not(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    text = "<|start|>user\nthe dog<|end|>\n<|start|>assistant\n"
    assert token_ids(tokenizer, TALK) == tokenizer.encode_batch([text], add_special_tokens=False)[0]
    for values in ({"prompt": "the dog"}, {"prompt": "the dog", "sampling": {}}):
        assert token_ids(tokenizer, values) == tokenizer.encode_batch(["the dog"], add_special_tokens=True)[0]
    assert token_ids(tokenizer, {"prompt": [9, 8]}) == [9, 8]


def test_the_system_message_is_for_chats_alone(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path)
    text = "<|start|>system\nis<|end|>\n<|start|>user\nthe dog<|end|>\n<|start|>assistant\n"
    assert token_ids(tokenizer, TALK, system="is") == tokenizer.encode_batch([text], add_special_tokens=False)[0]
    assert token_ids(tokenizer, {"prompt": "is"}, system="is") == token_ids(tokenizer, {"prompt": "is"})


@pytest.mark.parametrize(("own", "key"), [(None, "auto"), (CHAT_TEMPLATE, "none")])
def test_without_a_template_a_chat_fails_and_a_completion_runs(tmp_path: Path, own: str | None, key: str) -> None:
    tokenizer = tokenizer_of(tmp_path, chat_template=own)
    with pytest.raises(RowError, match=r"body\.messages: needs a chat template") as raised:
        token_ids(tokenizer, TALK, chat_template=key, system="is")
    assert raised.value.code == ErrorCode.TEMPLATE_ERROR
    assert token_ids(tokenizer, {"prompt": "the"}, chat_template=key)


def test_a_template_file_serves_a_model_without_one(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, chat_template=None)
    (tmp_path / "own.jinja").write_text(CHAT_TEMPLATE)
    assert token_ids(tokenizer, TALK, chat_template=str(tmp_path / "own.jinja"))


def test_a_chat_that_is_no_list_of_messages_fails(tmp_path: Path) -> None:
    with pytest.raises(RowError) as raised:
        token_ids(tokenizer_of(tmp_path), {"messages": [{"content": "no role"}]})
    assert raised.value.code == ErrorCode.INVALID_MESSAGES
