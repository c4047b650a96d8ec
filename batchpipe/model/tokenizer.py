"""Text to token ids and back, as the model's own tokenizer in `transformers` does it.

Neither pads nor truncates: what is too long is found, and said, where prompts are made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2.meta

from batchpipe.errors import ModelError

# Written behind a content to find its end; a template that strips the content takes away the mark's space.
_END_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


class Tokenizer:
    """One model's tokenizer, around that of transformers.

    template_time: what a chat template that asks for the time is told; None: the time at which it asks.
    """

    def __init__(self, backend: Any) -> None:
        self.template_time: datetime | None = None
        self._backend = backend
        self._fast = getattr(backend, "backend_tokenizer", None)
        if self._fast is not None:  # a saved tokenizer may bring the truncation of its training along
            self._fast.no_truncation()
            self._fast.no_padding()

    @property
    def has_chat_template(self) -> bool:
        return bool(self._backend.chat_template)

    @property
    def chat_template(self) -> str | None:
        """The text of the model's own template, of several that for chats."""
        template = self._backend.chat_template
        return template.get("default") if isinstance(template, dict) else template

    @property
    def end_token(self) -> tuple[int | None, str | None]:
        """Id and text of the token that the tokenizer's files name as the end; None where they name none."""
        return self._backend.eos_token_id, self._backend.eos_token

    @property
    def special_tokens(self) -> list[str]:
        """The texts of the special tokens."""
        return list(self._backend.all_special_tokens)

    @property
    def skipped_tokens(self) -> list[str]:
        """The texts of the tokens that decoding skips: the special ones, and added ones marked so."""
        added = self._backend.added_tokens_decoder.values()
        return sorted({*self.special_tokens, *(token.content for token in added if token.special)})

    def vocabulary(self) -> dict[str, int]:
        """Every token's text and id."""
        return dict(self._backend.get_vocab())

    def largest_token_id(self) -> int | None:
        """Of the tokens that the tokenizer was trained with, none added since; None where it cannot say."""
        if self._fast is None:
            return None
        return max(self._fast.get_vocab(with_added_tokens=False).values(), default=-1)

    def chat_template_variables(self, chat_template: str | None = None) -> frozenset[str]:
        """The names that the chat template reads and does not set itself; jinja2.TemplateSyntaxError if it is wrong."""
        names: set[str] = set()
        for template in self._templates(chat_template):
            environment = compiled_template(template).environment
            names |= jinja2.meta.find_undeclared_variables(environment.parse(template)) - environment.globals.keys()
        return frozenset(names)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        variables: Mapping[str, Any] = MappingProxyType({}),
        continue_final_message: bool = False,
    ) -> str:
        """The conversation as text, ending where the model is to go on; what the template raises passes through.

        `variables` are those of the template beside the messages, `tools` among them. With `continue_final_message` the
        text ends with the last message's content; ValueError if the template leaves out a part of it. The text holds
        the template's special tokens already: encode it with `add_special_tokens=False`.
        """

        def written(messages: Sequence[Mapping[str, Any]]) -> str:
            text: str = self._backend.apply_chat_template(
                list(messages),
                chat_template=chat_template,
                tokenize=False,
                add_generation_prompt=not continue_final_message,
                **variables,
            )
            return text

        # Not as a variable: transformers makes text of those.
        for template in self._templates(chat_template):
            compiled_template(template).environment.globals["strftime_now"] = self._strftime
        if not continue_final_message:
            return written(messages)
        *earlier, last = messages
        text = written([*earlier, {**last, "content": last["content"] + _END_MARK}])
        return _cut_at_mark(text, last["content"])

    def _templates(self, chat_template: str | None) -> list[str]:
        """That one, or all of the tokenizer's own."""
        given = chat_template or self._backend.chat_template
        return list(given.values()) if isinstance(given, dict) else [given]

    def _strftime(self, form: str) -> str:
        return (self.template_time or datetime.now()).strftime(form)

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of each text. Special tokens written in a text become those tokens, as in transformers."""
        if not texts:
            return []
        if self._fast is None:
            return list(self._backend(list(texts), add_special_tokens=add_special_tokens)["input_ids"])
        encodings = self._fast.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def beginning_token_ids(self) -> list[int]:
        """What is put before every text that is encoded with special tokens: mostly the begin token alone, or []."""
        (plain,) = self.encode_batch(["a"], add_special_tokens=False)
        (whole,) = self.encode_batch(["a"], add_special_tokens=True)
        places = range(len(whole) - len(plain) + 1)
        return whole[: next((place for place in places if whole[place : place + len(plain)] == plain), 0)]

    def encode_with_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]] | None:
        """Token ids and the characters [start, end) each stands for; None where the tokenizer cannot say."""
        if self._fast is None:
            return None
        encoding = self._fast.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def rigid_token_ids(self) -> frozenset[int]:
        """Added tokens that part the text wherever they stand, whatever is beside them."""
        return frozenset(
            token_id
            for token_id, token in self._backend.added_tokens_decoder.items()
            if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        )

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[0]

    def decode_batch(self, token_ids: Sequence[Sequence[int]], *, skip_special_tokens: bool = True) -> list[str]:
        if not token_ids:  # which transformers takes for one empty text
            return []
        try:
            return list(self._backend.batch_decode(token_ids, skip_special_tokens=skip_special_tokens))
        except Exception:  # each tokenizer raises what it likes for an id that it does not know
            known = [[token_id for token_id in ids if self._has_text(token_id)] for ids in token_ids]
            return list(self._backend.batch_decode(known, skip_special_tokens=skip_special_tokens))

    def _has_text(self, token_id: int) -> bool:
        """Whether the tokenizer can decode this id: an embedding may have rows that stand for no token."""
        try:
            self._backend.decode([token_id])
        except Exception:
            return False
        return True


def compiled_template(chat_template: str) -> jinja2.Template:
    """The template as transformers compiles and keeps it."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template: jinja2.Template = _compile_jinja_template(chat_template)
    return template


def _cut_at_mark(text: str, content: str) -> str:
    """`text` up to the mark behind `content`, whose white space alone the template may have changed."""
    before, mark, after = text.rpartition(_END_MARK.strip())
    if not mark or "".join(content.split()) not in "".join(before.split()):
        raise ValueError("it leaves out the last message or a part of it, which was to be continued")
    return before if after.startswith(" ") else before.rstrip()


def check_vocabulary(tokenizer: Tokenizer, vocabulary_size: int, folder: Path) -> None:
    """A tokenizer may be smaller than the embedding, which is often padded, and larger by tokens that were added.

    A row with such a token fails alone; a larger tokenizer of another kind is another model's: ModelError.
    """
    largest_id = tokenizer.largest_token_id()
    if largest_id is not None and largest_id >= vocabulary_size:
        raise ModelError(
            f"model.name: the tokenizer of {folder} has token id {largest_id} and the model's embedding has "
            f"{vocabulary_size} rows; the two files belong to different models"
        )


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a model folder; ModelError where it holds none that can be used."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers import AutoTokenizer

    if not any(folder.glob("*token*")) and not any(folder.glob("*vocab*")):
        # transformers would make up an empty tokenizer from config.json alone
        raise ModelError(f"model.name: {folder} holds no tokenizer files (tokenizer.json is missing)")
    try:
        return Tokenizer(AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code))
    except Exception as error:  # the tokenizers library raises bare Exception for a file it cannot read
        reason = str(error).strip().split("\n")[0]
        if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
            reason = (
                "it has tokenizer.model and no tokenizer.json; install what reads it (pip install sentencepiece "
                "protobuf tiktoken), or save a tokenizer.json beside it with "
                f"AutoTokenizer.from_pretrained(...).save_pretrained(...) ({reason})"
            )
        raise ModelError(f"model.name: the tokenizer of {folder} cannot be loaded: {reason}") from error
