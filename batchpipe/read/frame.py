"""The part of a rendered prompt that is the same for every row, found once so that the chat template runs seldom.

    text frame     <|im_start|>user\\n | content | <|im_end|>\\n<|im_start|>assistant\\n
    token frame    <|im_start|>        | user\\n + content | <|im_end|>\\n<|im_start|>assistant\\n

A frame is used only if it gives the same result as the chat template for every text of `PROBES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from batchpipe.errors import RowError
from batchpipe.model.tokenizer import Tokenizer

_MARK = "batchpipe0content0mark"
PROBES = (
    "a",
    "Hello, world.",
    "  two spaces before",
    "two spaces after  ",
    "\n\nline ends around\r\n\n",
    "\ttab\t",
    " ",
    "{braces} {{two}} {% if x %} {# note #} <|angle|> [INST] [/INST] <s> </s>",
    "<tool_response>\nx\n</tool_response>",
    "<think>\nx\n</think> /no_think /think",
    "'quotes' \"and\" \\backslash\\ & <b>",
    "\u00e9 e\u0301 \u4e2d\u6587 \u0627\u0644\u0639 \U0001f600 \u200b \u2028 \ufeff",
    "12345 67.8 -9",
    "assistant",
    "x" * 2_000,
)


@dataclass(frozen=True, slots=True)
class TextFrame:
    """The chat template turns one user message into `prefix + content + suffix`; it may strip the content first."""

    prefix: str
    suffix: str
    strips: bool

    def around(self, content: str) -> str:
        return self.prefix + (content.strip() if self.strips else content) + self.suffix


def find_text_frame(render: Callable[[str], str], special_tokens: Sequence[str]) -> TextFrame | None:
    """The frame of `render`, or None if no constant text around the content reproduces every rendered probe.

    A template may refuse a probe and still take the rows' own texts: then there is no frame. The RowError of a template
    that refuses all of them passes through.
    """
    probes = (_MARK, *PROBES, *(f"{token} x {token}" for token in special_tokens))
    rendered: list[str] = []
    refusals: list[RowError] = []
    for probe in probes:
        try:
            rendered.append(render(probe))
        except RowError as refusal:
            refusals.append(refusal)
    if not rendered:
        raise refusals[0]
    pieces = rendered[0].split(_MARK)
    if refusals or len(pieces) != 2:
        return None
    for strips in (False, True):
        frame = TextFrame(pieces[0], pieces[1], strips)
        if [frame.around(probe) for probe in probes] == rendered:
            return frame
    return None


@dataclass(frozen=True, slots=True)
class TokenFrame:
    """The tokens of a text frame that cannot depend on the content: its special tokens and those outside them."""

    prefix_characters: int
    prefix_token_ids: list[int]
    suffix_characters: int
    suffix_token_ids: list[int]

    def encode(self, tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of `texts`, each of which is a content inside the text frame."""
        start = self.prefix_characters
        inner = [text[start : len(text) - self.suffix_characters] for text in texts]
        encoded = tokenizer.encode_batch(inner, add_special_tokens=False)
        return [self.prefix_token_ids + token_ids + self.suffix_token_ids for token_ids in encoded]


def find_token_frame(frame: TextFrame, tokenizer: Tokenizer) -> TokenFrame | None:
    """The token frame of `frame`, or None if encoding the content apart would change the tokens of a probe."""
    prefix = tokenizer.encode_with_spans(frame.prefix)
    suffix = tokenizer.encode_with_spans(frame.suffix)
    if prefix is None or suffix is None:
        return None
    rigid = tokenizer.rigid_token_ids()
    prefix_cuts = [place for place, token_id in enumerate(prefix[0]) if token_id in rigid]
    suffix_cuts = [place for place, token_id in enumerate(suffix[0]) if token_id in rigid]
    if not prefix_cuts or not suffix_cuts:
        return None
    last, first = prefix_cuts[-1], suffix_cuts[0]
    suffix_characters = len(frame.suffix) - suffix[1][first][0]
    found = TokenFrame(prefix[1][last][1], prefix[0][: last + 1], suffix_characters, suffix[0][first:])
    texts = [frame.around(probe) for probe in (*PROBES, *tokenizer.special_tokens)]
    same = found.encode(tokenizer, texts) == tokenizer.encode_batch(texts, add_special_tokens=False)
    return found if same else None
