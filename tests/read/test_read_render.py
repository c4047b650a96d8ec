"""Prompts: the text transformers' own chat templating gives, by whatever shortcut; what is no prompt fails its row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from batchpipe.errors import JobError, RowError
from batchpipe.job.spec import InputSpec
from batchpipe.model.tokenizer import Tokenizer, load_tokenizer
from batchpipe.read.frame import PROBES
from batchpipe.read.render import Renderer, needed_columns
from batchpipe.types import ErrorCode
from tests.tiny_tokenizer import CHAT_TEMPLATE, build_tiny_tokenizer

STRIPPING = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")
SHOUTING = CHAT_TEMPLATE.replace("message['content']", "message['content'] | upper")
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{{ m['content'] }}<|end|>{% endfor %}"
)
DROPPING = (
    "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
)
TEXTS = (*PROBES, "Why?", "a<|end|>b", "<|begin|>", " \u00a0x\u3000", "{{ 7 * 7 }}{prompt}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), adds_begin_token=True)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def renderer_of(tokenizer: Tokenizer, **keys: Any) -> Renderer:
    return Renderer(InputSpec.model_validate({"path": "x.jsonl", **keys}), tokenizer)


def custom(tmp_path: Path, template: str) -> str:
    path = tmp_path / "template.jinja"
    path.write_text(template)
    return str(path)


def refused(renderer: Renderer, values: dict[str, Any]) -> tuple[ErrorCode, str]:
    with pytest.raises(RowError) as caught:
        renderer.render(values)
    return caught.value.code, caught.value.message


class TestAsTransformers:
    """Text and tokens equal `apply_chat_template`, with and without frames."""

    @pytest.mark.parametrize("system", [None, "Be brief. "])
    @pytest.mark.parametrize("template", [CHAT_TEMPLATE, STRIPPING, SHOUTING])
    def test_one_user_message(self, folder: Path, tmp_path: Path, template: str, system: str | None) -> None:
        theirs = AutoTokenizer.from_pretrained(folder)
        tokenizer = load_tokenizer(folder)
        renderer = renderer_of(tokenizer, chat_template=custom(tmp_path, template), system=system)
        assert (renderer._text_frame is None) == (template is SHOUTING)
        for text in TEXTS:
            messages = [] if system is None else [{"role": "system", "content": system}]
            messages.append({"role": "user", "content": text})
            keys: dict[str, Any] = {"chat_template": template, "add_generation_prompt": True}
            rendered = renderer.render({"prompt": text})
            assert isinstance(rendered, str)
            assert rendered == theirs.apply_chat_template(messages, tokenize=False, **keys)
            expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **keys)
            assert renderer.encode([rendered]) == [expected]

    def test_the_constant_tokens_are_found(self, tokenizer: Tokenizer) -> None:
        frame = renderer_of(tokenizer)._token_frame
        assert frame is not None
        assert (frame.prefix_token_ids[-1], frame.suffix_token_ids[0]) == (1, 2)

    def test_the_same_prompt_again_and_again(self, tokenizer: Tokenizer) -> None:
        renderer = renderer_of(tokenizer)
        texts = [renderer.render({"prompt": "same"}) for _ in range(1_000)]
        assert len(set(texts)) == 1
        assert len({tuple(ids) for ids in renderer.encode(texts)}) == 1  # type: ignore[arg-type]

    def test_no_second_begin_token(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        renderer = renderer_of(tokenizer, chat_template=custom(tmp_path, "{{ bos_token }}{{ messages[0].content }}"))
        (token_ids,) = renderer.encode([renderer.render({"prompt": "x"})])  # type: ignore[list-item]
        assert token_ids.count(0) == 1
        (token_ids,) = renderer_of(tokenizer, chat_template="none").encode(["x"])
        assert token_ids.count(0) == 1

    def test_a_conversation(self, folder: Path, tokenizer: Tokenizer) -> None:
        theirs = AutoTokenizer.from_pretrained(folder)
        renderer = renderer_of(tokenizer, messages_column="chat", system="Be brief.")
        system = {"role": "system", "content": "Be brief."}
        own = {"role": "system", "content": "Be long."}
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        more = [*turns, {"role": "user", "content": "c"}]
        for given, expected in ((more, [system, *more]), ([own, *more], [own, *more])):
            assert renderer.render({"chat": given}) == theirs.apply_chat_template(
                expected, tokenize=False, add_generation_prompt=True
            )
        assert renderer.render({"chat": turns}) == theirs.apply_chat_template(
            [system, *turns], tokenize=False, continue_final_message=True
        )


class TestPromptColumn:
    @pytest.mark.parametrize(
        ("values", "code", "words"),
        [
            ({}, ErrorCode.MISSING_PROMPT, "column 'prompt' is missing or null"),
            ({"prompt": None}, ErrorCode.MISSING_PROMPT, "column 'prompt' is missing or null"),
            ({"prompt": ""}, ErrorCode.EMPTY_PROMPT, "the prompt is empty"),
            ({"prompt": []}, ErrorCode.EMPTY_PROMPT, "the prompt is empty"),
            ({"prompt": 3}, ErrorCode.WRONG_TYPE, "column 'prompt' holds a int, not text"),
            ({"prompt": {"a": 1}}, ErrorCode.WRONG_TYPE, "column 'prompt' holds a dict, not text"),
            ({"prompt": [1, "a"]}, ErrorCode.WRONG_TYPE, "a list of other things than token ids"),
            ({"prompt": [True]}, ErrorCode.WRONG_TYPE, "a list of other things than token ids"),
        ],
    )
    def test_what_is_no_prompt(self, tokenizer: Tokenizer, values: dict[str, Any], code: ErrorCode, words: str) -> None:
        found, message = refused(renderer_of(tokenizer), values)
        assert found == code
        assert words in message

    @pytest.mark.parametrize("text", [" ", "\n\n", "\u200b"])
    def test_space_is_a_prompt(self, tokenizer: Tokenizer, text: str) -> None:
        assert renderer_of(tokenizer, chat_template="none").render({"prompt": text}) == text
        assert text in str(renderer_of(tokenizer).render({"prompt": text}))

    def test_token_ids_are_taken_as_they_are(self, tokenizer: Tokenizer) -> None:
        assert renderer_of(tokenizer).render({"prompt": [5, 6]}) == [5, 6]

    def test_without_chat_template_the_text_is_the_prompt(self, tmp_path: Path) -> None:
        plain = load_tokenizer(build_tiny_tokenizer(tmp_path, chat_template=None))
        assert renderer_of(plain).render({"prompt": "x"}) == "x"
        for keys, words in (({"system": "s"}, "input.system"), ({"messages_column": "m"}, "input.messages_column")):
            with pytest.raises(JobError, match=f"{words}: needs a chat template, and the model has none"):
                renderer_of(plain, **keys)
            with pytest.raises(JobError, match=f"{words}: .* input.chat_template is none"):
                renderer_of(plain, chat_template="none", **keys)


def test_needed_columns() -> None:
    def needed(sampling_column: str | None = None, **keys: Any) -> frozenset[str]:
        return needed_columns(InputSpec.model_validate({"path": "x", **keys}), sampling_column)

    assert needed() == {"prompt"}
    assert needed(template="{a} {b} {a}") == {"a", "b"}
    assert needed("s", messages_column="chat") == {"chat", "s"}


class TestMessages:
    @pytest.mark.parametrize(
        ("value", "words"),
        [
            ([], "holds no messages"),
            ("hi", "not a list of {role, content}; write `prompt_column: chat` under `input` if it holds"),
            (["hi"], "message 1 is a str"),
            ([{"content": "x"}], "message 1 has no role; it has 'content'"),
            ([{"role": "user"}], r"message 1 (user) has no content"),
            ([{"role": "user", "content": None}], r"message 1 (user) has no content"),
            ([{"role": "user", "content": 3}], "the content of message 1 is a int, not text"),
            ([{"role": "user", "content": [{"type": "image_url"}]}], "content part of type 'image_url'"),
            ([{"role": "user", "content": ["x"]}], "content part of type 'str'"),
        ],
    )
    def test_what_is_no_conversation(self, tokenizer: Tokenizer, value: Any, words: str) -> None:
        code, message = refused(renderer_of(tokenizer, messages_column="chat"), {"chat": value})
        assert code == ErrorCode.INVALID_MESSAGES
        assert words in message

    def test_null_is_a_missing_prompt(self, tokenizer: Tokenizer) -> None:
        code, _ = refused(renderer_of(tokenizer, messages_column="chat"), {"chat": None})
        assert code == ErrorCode.MISSING_PROMPT

    def test_text_parts_are_joined_and_null_fields_left_out(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        template = custom(tmp_path, "{% for m in messages %}{{ m.content }}{{ 'name' in m }}{% endfor %}")
        renderer = renderer_of(tokenizer, messages_column="chat", chat_template=template)
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        assert renderer.render({"chat": [{"role": "user", "content": parts, "name": None}]}) == "a\nbFalse"

    def test_roles_must_suit_the_template(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        renderer = renderer_of(tokenizer, messages_column="chat", chat_template=custom(tmp_path, ALTERNATING))
        code, message = refused(renderer, {"chat": [{"role": "user", "content": "a"}] * 2})
        assert code == ErrorCode.TEMPLATE_ERROR
        assert message == "the chat template refuses the messages: roles must alternate user/assistant"
        assert renderer.render({"chat": [{"role": "user", "content": "a"}]}) == "a<|end|>"

    @pytest.mark.parametrize("role", ["tool", "critic"])
    def test_a_role_that_the_template_drops_is_refused(self, tokenizer: Tokenizer, tmp_path: Path, role: str) -> None:
        chat = [{"role": "user", "content": "hi"}, {"role": role, "content": "42 degrees"}]
        assert "42 degrees" in str(renderer_of(tokenizer, messages_column="chat").render({"chat": chat}))
        renderer = renderer_of(tokenizer, messages_column="chat", chat_template=custom(tmp_path, DROPPING))
        code, message = refused(renderer, {"chat": chat})
        assert (code, message) == (ErrorCode.INVALID_MESSAGES, f"the chat template leaves out the role {role!r}")

    def test_tool_calls_need_no_content(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        template = custom(tmp_path, "{% for m in messages %}{{ m.content or m.tool_calls[0].name }}{% endfor %}")
        call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}
        renderer = renderer_of(tokenizer, messages_column="chat", chat_template=template)
        assert renderer.render({"chat": [call, {"role": "user", "content": "x"}]}) == "lookx"

    def test_a_template_may_want_more_than_one_message(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        """It refuses the one message that the renderer tries it with; the rows bring what it wants."""
        template = custom(
            tmp_path, "{% if messages | length < 2 %}{{ raise_exception('too few') }}{% endif %}" + DROPPING
        )
        renderer = renderer_of(tokenizer, messages_column="chat", chat_template=template)
        message = {"role": "user", "content": "a"}
        assert renderer.render({"chat": [message, message]}) == "a<|end|>a<|end|>"
        assert refused(renderer, {"chat": [message]})[0] == ErrorCode.TEMPLATE_ERROR
        with pytest.raises(JobError, match="input.chat_template: no prompt can be written: .*too few"):
            renderer_of(tokenizer, chat_template=template)

    def test_a_template_may_fail_for_one_row(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        template = custom(tmp_path, "{{ 1 / (messages[0].content | length - 3) }}")
        renderer = renderer_of(tokenizer, chat_template=template)
        assert renderer.render({"prompt": "four"}) == "1.0"
        code, message = refused(renderer, {"prompt": "two"})
        assert code == ErrorCode.TEMPLATE_ERROR
        assert "division by zero" in message

    def test_templates_run_in_a_sandbox(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        with pytest.raises(JobError, match="no prompt can be written: .*unsafe"):
            renderer_of(tokenizer, chat_template=custom(tmp_path, "{{ messages.__class__.__base__ }}"))


class TestChatTemplateOfTheJob:
    def test_a_system_message_that_the_template_refuses(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
        with pytest.raises(JobError, match=r"input.chat_template, input.system: .* no system role"):
            renderer_of(tokenizer, system="s", chat_template=custom(tmp_path, template))

    @pytest.mark.parametrize("keys", [{}, {"messages_column": "chat"}])
    def test_a_template_that_cannot_be_parsed(self, tokenizer: Tokenizer, tmp_path: Path, keys: dict[str, Any]) -> None:
        with pytest.raises(JobError, match="input.chat_template: no prompt can be written"):
            renderer_of(tokenizer, chat_template=custom(tmp_path, "{% if %}"), **keys)

    def test_a_template_that_is_not_there(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        with pytest.raises(JobError, match=r"input.chat_template: cannot read .*nope\.jinja"):
            renderer_of(tokenizer, chat_template=str(tmp_path / "nope.jinja"))

    @pytest.mark.parametrize("content", ['{"degrees": "42"}', "two\nlines"])
    def test_a_role_whose_content_is_written_escaped_is_not_left_out(
        self, tokenizer: Tokenizer, tmp_path: Path, content: str
    ) -> None:
        escaping = "{% for m in messages %}{{ m.content if m.role == 'user' else m.content | tojson }}{% endfor %}"
        renderer = renderer_of(tokenizer, messages_column="chat", chat_template=custom(tmp_path, escaping))
        chat = [{"role": "user", "content": "hi"}, {"role": "tool", "content": content}]
        assert renderer.render({"chat": chat}) == "hi" + json.dumps(content)


def test_a_template_that_refuses_some_texts_fails_their_rows_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    picky = (
        "{% for m in messages %}{% if '</' in m.content %}{{ raise_exception('no tags') }}{% endif %}{{ m.content }}"
    )
    renderer = renderer_of(tokenizer, chat_template=custom(tmp_path, picky + "{% endfor %}"))
    assert renderer.render({"prompt": "hello"}) == "hello"
    assert refused(renderer, {"prompt": "a </b>"})[0] == ErrorCode.TEMPLATE_ERROR
