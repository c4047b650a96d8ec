"""Prompts: the text transformers' own chat templating gives, by whatever shortcut; what is no prompt fails its row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

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

    @pytest.mark.parametrize("keys", [{}, {"template": "<|begin|>{prompt}"}, {"template": "{begin}{prompt}"}])
    def test_a_text_that_begins_with_the_begin_token_has_it_once(
        self, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, keys: dict[str, str]
    ) -> None:
        renderer = renderer_of(tokenizer, chat_template="none", **keys)
        rows = ["x<|begin|>", "<|begin|>x", "<|begin|>", "<|begin|><|begin|>x"] if not keys else ["x", "x"]
        values = [{"prompt": text, "begin": "<|begin|>"} for text in rows]
        encoded = renderer.encode([str(renderer.render(row)) for row in values])
        texts = [text if text.startswith("<|begin|>") else "<|begin|>" + text for text in rows]
        assert encoded == tokenizer.encode_batch(texts, add_special_tokens=False)
        [record] = caplog.records
        assert (
            record.getMessage()
            == "prompts begin with the tokenizer's own '<|begin|>', so it is not added to them again"
        )

    def test_a_tokenizer_that_adds_nothing_takes_nothing_away(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        plain = load_tokenizer(build_tiny_tokenizer(tmp_path))
        texts = ["<|begin|>x", "<|begin|><|begin|>x", ""]
        encoded = renderer_of(plain, chat_template="none").encode(texts)
        assert encoded == plain.encode_batch(texts, add_special_tokens=False)
        assert not caplog.records

    def test_a_prompt_that_looks_rendered_already_is_told_once(
        self, tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        renderer = renderer_of(tokenizer)
        for text in ("x", "x<|start|>", "<|end|>x", renderer.render({"prompt": "x"}), "<|start|>y"):
            renderer.render({"prompt": text})
        [record] = caplog.records
        assert "begin with '<|start|>'" in record.getMessage()
        assert "write `chat_template: none` under `input`" in record.getMessage()
        bare = renderer_of(tokenizer, chat_template=custom(tmp_path, "{{ messages[0].content }}"))
        assert bare.render({"prompt": "<|start|>x"}) == "<|start|>x"
        assert len(caplog.records) == 1

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
            ({"prompt": [{"role": "user"}]}, ErrorCode.WRONG_TYPE, "write `messages_column: prompt` under `input`"),
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

    def test_a_template_may_refuse_every_text_but_the_rows_own(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        """Of the texts that the renderer tries, it takes the few with a space inside."""
        wordy = "{% if ' ' not in messages[0].content %}{{ raise_exception('one word') }}{% endif %}<"
        renderer = renderer_of(tokenizer, chat_template=custom(tmp_path, wordy + "{{ messages[0].content }}"))
        assert renderer.render({"prompt": "two words"}) == "<two words"
        assert refused(renderer, {"prompt": "one"})[0] == ErrorCode.TEMPLATE_ERROR

    def test_a_role_whose_content_only_the_template_knows_to_check(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        """What it reads of a tool's result is cut or checked, so another content of ours is hidden or refused."""
        ending = (
            "{% if not m.content.endswith('}') %}{{ raise_exception('no object') }}{% endif %}{{ m.content | tojson }}"
        )
        for written, kept in (("{{ m.content[:4] | upper }}", '{"A"'), (ending, '"{\\"a\\": 1}"')):
            template = "{% for m in messages %}{% if m.role == 'tool' %}" + written
            template += "{% else %}{{ m.content }}{% endif %}{% endfor %}"
            renderer = renderer_of(tokenizer, messages_column="chat", chat_template=custom(tmp_path, template))
            chat = [{"role": "user", "content": "hi"}, {"role": "tool", "content": '{"a": 1}'}]
            assert renderer.render({"chat": chat}) == "hi" + kept

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


class TestLastAnswer:
    CHAT: ClassVar = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b <x>\n\nc"}]

    def test_it_is_dropped_or_continued(self, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
        texts = {}
        for last_answer in ("auto", "continue", "drop"):
            renderer = renderer_of(tokenizer, messages_column="chat", last_answer=last_answer)
            texts[last_answer] = [renderer.render({"chat": self.CHAT}) for _ in range(2)]
            assert renderer.render({"chat": self.CHAT[:1]}) == renderer.render({"chat": self.CHAT[:1]})
            assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "write `last_answer: drop` under `input`" in caplog.text
        assert texts["auto"] == texts["continue"]
        assert str(texts["auto"][0]).endswith("<|start|>assistant\nb <x>\n\nc")
        assert texts["drop"] == [renderer.render({"chat": self.CHAT[:1]})] * 2

    def test_a_call_of_tools_cannot_be_continued(self, tokenizer: Tokenizer) -> None:
        chat = [self.CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}]
        code, message = refused(renderer_of(tokenizer, messages_column="chat"), {"chat": chat})
        assert (code, "last_answer: drop" in message) == (ErrorCode.INVALID_MESSAGES, True)

    @pytest.mark.parametrize(
        ("written", "end"),
        [
            ("{{ m.content | trim }}", "b <x>\n\nc"),
            ("{{ m.content.split('<x>')[0] ~ '<x>\n' ~ m.content.split('<x>')[-1].lstrip() }}", "b <x>\nc "),
            ("{{ m['con' ~ 'tent'] }}", "b <x>\n\nc "),
        ],
    )
    def test_a_template_may_change_white_space(
        self, tokenizer: Tokenizer, tmp_path: Path, written: str, end: str
    ) -> None:
        template = custom(tmp_path, "{% for m in messages %}|" + written + "<|end|>{% endfor %}")
        renderer = renderer_of(tokenizer, messages_column="chat", chat_template=template)
        last = {**self.CHAT[1], "content": self.CHAT[1]["content"] + " "}
        text = renderer.render({"chat": [{"role": "user", "content": "a<x>"}, last]})
        assert str(text).rpartition("|")[2] == end

    def test_what_the_template_leaves_out_cannot_be_continued(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        for written in ("{{ m.content.split('<x>')[-1] }}", "{{ m.content[:1] }}", "x"):
            template = custom(tmp_path, "{% for m in messages %}" + written + "{% endfor %}")
            renderer = renderer_of(tokenizer, messages_column="chat", chat_template=template)
            code, message = refused(renderer, {"chat": self.CHAT})
            assert code == ErrorCode.TEMPLATE_ERROR
            assert message.endswith("it leaves out the last message or a part of it, which was to be continued")


class TestTemplateVariables:
    TEMPLATE = CHAT_TEMPLATE + "{{ '<think></think>' if enable_thinking is defined and not enable_thinking }}{{ tone }}"

    def test_the_job_sets_them_for_every_row(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        path = custom(tmp_path, self.TEMPLATE)
        plain = renderer_of(tokenizer, chat_template=path)
        quick = renderer_of(tokenizer, chat_template=path, template_variables={"enable_thinking": False, "tone": "!"})
        assert quick._text_frame is not None
        texts = [str(renderer.render({"prompt": "x"})) for renderer in (plain, quick)]
        assert texts[1] == texts[0] + "<think></think>!"
        chat = [{"role": "user", "content": "x"}]
        of_messages = renderer_of(
            tokenizer, messages_column="c", chat_template=path, template_variables={"enable_thinking": False}
        )
        assert of_messages.render({"c": chat}) == texts[0] + "<think></think>"

    @pytest.mark.parametrize("as_text", [False, True])
    def test_a_row_sets_its_own(self, tokenizer: Tokenizer, tmp_path: Path, as_text: bool) -> None:
        renderer = renderer_of(
            tokenizer,
            chat_template=custom(tmp_path, self.TEMPLATE),
            template_variables={"tone": "!"},
            template_variables_column="v",
        )

        def end(variables: Any) -> str:
            text = renderer.render({"prompt": "x", "v": json.dumps(variables) if as_text else variables})
            assert renderer.encode([str(text)]) == tokenizer.encode_batch([str(text)], add_special_tokens=False)
            return str(text).rpartition("assistant\n")[2]

        assert end({"enable_thinking": False}) == "<think></think>!"
        assert end({"enable_thinking": None, "tone": "?"}) == "?"
        assert end(None) == end({}) == end([]) == "!"

    def test_a_name_that_the_template_never_reads_is_told_once(
        self, tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        keys = {"template_variables": {"enable_thinkng": False}, "template_variables_column": "v"}
        renderer = renderer_of(tokenizer, chat_template=custom(tmp_path, self.TEMPLATE), **keys)
        for _ in range(2):
            renderer.render({"prompt": "x", "v": {"day": 1}})
        told = [record.getMessage().partition(": ")[2] for record in caplog.records]
        assert told[0] == "the chat template reads no 'enable_thinkng'; did you mean 'enable_thinking'?"
        assert told[1:] == [
            "the chat template reads no 'day' (it reads add_generation_prompt, enable_thinking, messages, tone)"
        ]

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            ("{", "column 'v' is not valid JSON"),
            (3, "column 'v' holds a int, not an object of variables"),
            (["a"], "column 'v' holds a list, not an object of variables"),
            ({"messages": []}, "column 'v' sets 'messages', which is no variable of a row"),
            ({"tools": 3}, "column 'v'.tools holds a int, not a list of tools"),
        ],
    )
    def test_what_is_no_variables(self, tokenizer: Tokenizer, value: Any, words: str) -> None:
        code, message = refused(renderer_of(tokenizer, template_variables_column="v"), {"prompt": "x", "v": value})
        assert code == ErrorCode.WRONG_TYPE
        assert words in message

    def test_without_chat_template_there_is_none_to_give_them_to(self, tokenizer: Tokenizer) -> None:
        for key, value in (("template_variables", {"a": 1}), ("template_variables_column", "v"), ("tools_column", "t")):
            with pytest.raises(JobError, match=f"input.{key}: needs a chat template"):
                renderer_of(tokenizer, chat_template="none", **{key: value})

    def test_needed_columns(self) -> None:
        keys = {"path": "x", "template_variables_column": "v", "tools_column": "t"}
        assert needed_columns(InputSpec.model_validate(keys), "s") == {"prompt", "v", "t", "s"}


class TestTools:
    TEMPLATE = "{% if tools is defined and tools is not none %}{{ tools | tojson }}{% endif %}" + CHAT_TEMPLATE
    TOOL: ClassVar[dict[str, Any]] = {
        "type": "function",
        "function": {"name": "add", "parameters": {"a": {"default": None}}},
    }

    def test_as_transformers(self, folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
        theirs = AutoTokenizer.from_pretrained(folder)
        chat = [{"role": "user", "content": "x"}]
        renderer = renderer_of(
            tokenizer, messages_column="c", tools_column="t", chat_template=custom(tmp_path, self.TEMPLATE)
        )
        schema = json.dumps(self.TOOL["function"]["parameters"])
        text_schema = {"type": "function", "function": {"name": "add", "parameters": schema}}
        for given in ([self.TOOL], json.dumps([self.TOOL]), [json.dumps(self.TOOL)], [text_schema]):
            assert renderer.render({"c": chat, "t": given}) == theirs.apply_chat_template(
                chat, tools=[self.TOOL], chat_template=self.TEMPLATE, tokenize=False, add_generation_prompt=True
            )
        empty: list[Any] = [None, [], "[]", ""]
        for nothing in empty:
            assert renderer.render({"c": chat, "t": nothing}) == renderer_of(tokenizer).render({"prompt": "x"})

    def test_those_of_the_job_are_for_rows_without(self, tokenizer: Tokenizer, tmp_path: Path) -> None:
        path = custom(tmp_path, self.TEMPLATE)
        variables = {"tools": [self.TOOL]}
        renderer = renderer_of(tokenizer, tools_column="t", template_variables=variables, chat_template=path)
        own = str(renderer.render({"prompt": "x", "t": [{"name": "say"}]}))
        assert own.startswith('[{"name": "say"}]')
        assert str(renderer.render({"prompt": "x", "t": None})).startswith(json.dumps([self.TOOL]))
        with pytest.raises(JobError, match="input.template_variables.tools holds a int, not a list of tools"):
            renderer_of(tokenizer, template_variables={"tools": 3}, chat_template=path)

    def test_a_template_without_a_place_for_them(self, tokenizer: Tokenizer) -> None:
        renderer = renderer_of(tokenizer, tools_column="t")
        assert renderer.render({"prompt": "x", "t": None}) == renderer_of(tokenizer).render({"prompt": "x"})
        code, message = refused(renderer, {"prompt": "x", "t": [self.TOOL]})
        assert code == ErrorCode.TEMPLATE_ERROR
        assert message == "the chat template has no place for tools; give another one as input.chat_template"
        with pytest.raises(JobError, match="input.template_variables: the chat template has no place for tools"):
            renderer_of(tokenizer, template_variables={"tools": [self.TOOL]})

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            ("[", "column 't' is not valid JSON"),
            ({"a": 1}, "column 't' holds a dict, not a list of tools"),
            ([3], "column 't': tool 1 is a int, not an object"),
        ],
    )
    def test_what_is_no_tools(self, tokenizer: Tokenizer, value: Any, words: str) -> None:
        code, message = refused(renderer_of(tokenizer, tools_column="t"), {"prompt": "x", "t": value})
        assert code == ErrorCode.WRONG_TYPE
        assert words in message
