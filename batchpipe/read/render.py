"""A row's values to the prompt: its text, or its token ids if the row brings token ids.

Prompt column, template or messages become one conversation, which the model's chat template turns into text; without
a chat template (or with `chat_template: none`) the text itself is the prompt. The tokenizer reads special tokens that
a row's text spells out as such, exactly as `apply_chat_template(..., tokenize=True)` does.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from batchpipe.errors import JobError, RowError
from batchpipe.job.spec import InputSpec
from batchpipe.model.tokenizer import Tokenizer
from batchpipe.read.content import COMMON_ROLES, Message, checked_messages, without_last_answer
from batchpipe.read.frame import TextFrame, find_text_frame, find_token_frame
from batchpipe.read.nested import value_at
from batchpipe.read.prompt_template import PromptTemplate
from batchpipe.read.template_inputs import TOOLS, TemplateInputs
from batchpipe.types import ErrorCode

logger = logging.getLogger(__name__)

# What a template raises if it cannot handle a row's data; any other exception is a mistake of ours.
_PYTHON_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_TEMPLATE_ERRORS = (jinja2.TemplateError, *_PYTHON_ERRORS)


_OTHER_CONTENT = " other"


def needed_columns(spec: InputSpec, sampling_column: str | None) -> frozenset[str]:
    """The columns from which prompts and a row's sampling settings are made."""
    extra = TemplateInputs(spec).columns | (frozenset() if sampling_column is None else frozenset([sampling_column]))
    if spec.messages_column is not None:
        return extra | {spec.messages_column}
    if spec.template is not None:
        return extra | PromptTemplate(spec.template).columns
    return extra | {spec.prompt_column}


class Renderer:
    """Turns rows into prompts; JobError if the job asks for what the model's chat template cannot do."""

    def __init__(self, spec: InputSpec, tokenizer: Tokenizer) -> None:
        self._spec = spec
        self._tokenizer = tokenizer
        self._template = PromptTemplate(spec.template) if spec.template is not None else None
        self._chat_template = _custom_template(spec.chat_template)
        has_template = self._chat_template is not None or tokenizer.has_chat_template
        self._has_chat = has_template and spec.chat_template != "none"
        self._inputs = TemplateInputs(spec)
        if not self._has_chat:
            _check_plain_text_will_do(spec)
        self._names = self._template_names() if self._has_chat else frozenset[str]()
        self._said: set[str] = set()
        try:
            self._check_read(self._inputs.of_job)
        except RowError as error:
            raise JobError(f"input.template_variables: {error.message}") from error
        self._beginning = [] if self._has_chat else tokenizer.beginning_token_ids()
        self._text_frame = self._find_frame() if self._has_chat else None
        self._token_frame = find_token_frame(self._text_frame, tokenizer) if self._text_frame else None
        prefix = self._text_frame.prefix if self._text_frame else ""
        # The special token that every prompt begins with.
        self._opening = max((text for text in tokenizer.special_tokens if prefix.startswith(text)), default="", key=len)

    @property
    def chat_template(self) -> str | None:
        """The text of the template that writes the prompts; None if there is none."""
        return (self._chat_template or self._tokenizer.chat_template) if self._has_chat else None

    def render(self, values: Mapping[str, Any]) -> str | list[int]:
        """The prompt's text for `encode`, or the token ids that the row brings; RowError if the row has no prompt."""
        if self._spec.messages_column is not None:
            return self._conversation(self._messages(values), self._inputs.of(values))
        content = self._template.fill(values) if self._template is not None else self._prompt(values)
        if not content:
            raise RowError(ErrorCode.EMPTY_PROMPT, "the prompt is empty")
        if isinstance(content, list):
            return content
        if self._opening and content.startswith(self._opening):
            self._say_once(
                f"prompts begin with {self._opening!r}, as what the chat template writes around them does; if they are "
                "rendered already, write `chat_template: none` under `input`"
            )
        if self._text_frame is not None:
            return self._text_frame.around(content)
        if not self._has_chat:
            return content
        return self._conversation([{"role": "user", "content": content}], self._inputs.of(values))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered `texts`. Special tokens are added only if no chat template has written them already."""
        if self._token_frame is not None:
            return self._token_frame.encode(self._tokenizer, texts)
        encoded = self._tokenizer.encode_batch(texts, add_special_tokens=not self._has_chat)
        return encoded if self._has_chat else list(map(self._with_one_beginning, encoded))

    def _prompt(self, values: Mapping[str, Any]) -> str | list[int]:
        column = self._spec.prompt_column
        value = value_at(values, column)
        if isinstance(value, str):
            return value
        if value is None or value != value:  # pandas writes NaN for null
            raise RowError(ErrorCode.MISSING_PROMPT, f"column {column!r} is missing or null")
        if isinstance(value, list) and all(type(token_id) is int for token_id in value):
            return value
        if isinstance(value, list) and all(isinstance(message, dict) for message in value):
            message = f"column {column!r} holds messages; write `messages_column: {column}` under `input`"
            raise RowError(ErrorCode.WRONG_TYPE, message)
        kind = "list of other things than token ids" if isinstance(value, list) else type(value).__name__
        raise RowError(ErrorCode.WRONG_TYPE, f"column {column!r} holds a {kind}, not text")

    def _with_one_beginning(self, token_ids: list[int]) -> list[int]:
        """Without the tokens that the tokenizer put before a text which begins with them itself."""
        beginning = self._beginning
        length = len(beginning)
        if not length or token_ids[: 2 * length] != 2 * beginning:
            return token_ids
        text = self._tokenizer.decode(beginning, skip_special_tokens=False)
        self._say_once(f"prompts begin with the tokenizer's own {text!r}, so it is not added to them again")
        return token_ids[length:]

    def _messages(self, values: Mapping[str, Any]) -> list[Message]:
        column = self._spec.messages_column
        assert column is not None
        messages = checked_messages(value_at(values, column), column)
        if self._spec.last_answer == "drop":
            return without_last_answer(messages)
        if messages[-1]["role"] == "assistant":
            if messages[-1]["content"] is None:
                message = "the last message has no content to continue; input.last_answer: drop has it written anew"
                raise RowError(ErrorCode.INVALID_MESSAGES, message)
            if self._spec.last_answer == "auto":
                self._say_once(
                    "input.last_answer: conversations that end with the assistant's turn are continued where it ends; "
                    "write `last_answer: drop` under `input` to have it written anew, `continue` if this is meant"
                )
        return messages

    def _conversation(self, messages: list[Message], variables: Mapping[str, Any]) -> str:
        """The text that the chat template makes of `messages`; a last message of the assistant is left open."""
        self._check_read(variables)
        if self._spec.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._spec.system}, *messages]
        text = self._apply_template(messages, variables)
        for place, message in enumerate(messages):
            role, content = message["role"], message["content"]
            if role in COMMON_ROLES or not content or content.strip() in text:
                continue
            # A template may also write the content escaped or cut, so only what changes nothing is left out.
            others = ({**message, "content": other} for other in (content + _OTHER_CONTENT, _OTHER_CONTENT + content))
            changed = ([*messages[:place], other, *messages[place + 1 :]] for other in others)
            if all(self._is_text_of(text, other, variables) for other in changed):
                raise RowError(ErrorCode.INVALID_MESSAGES, f"the chat template leaves out the role {role!r}")
        return text

    def _is_text_of(self, text: str, messages: list[Message], variables: Mapping[str, Any]) -> bool:
        try:
            return self._apply_template(messages, variables) == text
        except RowError:
            return False

    def _apply_template(self, messages: list[Message], variables: Mapping[str, Any]) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._chat_template,
                variables=variables,
                continue_final_message=messages[-1]["role"] == "assistant",
            )
        except _TEMPLATE_ERRORS as error:
            message = f"the chat template refuses the messages: {error or type(error).__name__}"
            raise RowError(ErrorCode.TEMPLATE_ERROR, message) from error

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning("%s", message)

    def _template_names(self) -> frozenset[str]:
        try:
            return self._tokenizer.chat_template_variables(self._chat_template)
        except jinja2.TemplateSyntaxError as error:
            message = f"no prompt can be written: line {error.lineno} of the template: {error.message}"
            raise JobError(f"input.chat_template: {message}") from error

    def _check_read(self, names: Iterable[str]) -> None:
        """Says once what the chat template never reads; RowError if that is tools, which a prompt is wrong without."""
        for name in sorted(set(names) - self._names):
            if name == TOOLS:
                message = "the chat template has no place for tools; give another one as input.chat_template"
                raise RowError(ErrorCode.TEMPLATE_ERROR, message)
            near = difflib.get_close_matches(name, self._names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f" (it reads {', '.join(sorted(self._names))})"
            self._say_once(f"input.template_variables: the chat template reads no {name!r}{hint}")

    def _find_frame(self) -> TextFrame | None:
        """The text around every prompt if it is the same for all rows; also checks the chat template."""
        if self._spec.messages_column is not None or self._inputs.columns:
            return None  # the rows bring more than a user's text, and the template may refuse that alone

        def render(content: str) -> str:
            return self._conversation([{"role": "user", "content": content}], self._inputs.of_job)

        try:
            return find_text_frame(render, self._tokenizer.special_tokens)
        except RowError as error:
            keys = "input.chat_template" + (", input.system" if self._spec.system is not None else "")
            raise JobError(f"{keys}: no prompt can be written: {error.message}") from error


def _custom_template(chat_template: str) -> str | None:
    if chat_template in ("auto", "none"):
        return None
    try:
        return Path(chat_template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"input.chat_template: cannot read {chat_template}: {error}") from error


def _check_plain_text_will_do(spec: InputSpec) -> None:
    of_chats = ("messages_column", "system", "template_variables", "template_variables_column", "tools_column")
    for key in of_chats:
        if getattr(spec, key) not in (None, {}):
            raise JobError(
                f"input.{key}: needs a chat template, and "
                + ("input.chat_template is none" if spec.chat_template == "none" else "the model has none")
                + "; give one as input.chat_template"
            )
