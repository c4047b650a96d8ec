"""`input.template`: places are filled, whatever the row holds; nothing else of a row can be reached."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Any

import pytest

from batchpipe.errors import JobError, RowError
from batchpipe.read.prompt_template import PromptTemplate
from batchpipe.types import ErrorCode


def test_places_are_filled_and_braces_left() -> None:
    values = {"q": "{a} {{b}} {q.x}", "n": 1.5, "two words": True, "a.b": "inner"}
    template = PromptTemplate("{{json}}: {q}/{n}/{two words}/{a.b}\n")
    assert template.fill(values) == "{json}: {a} {{b}} {q.x}/1.5/True/inner\n"
    assert template.columns == {"q", "n", "two words", "a.b"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (["Paris", "Rome, \u00e9"], "Paris\nRome, \u00e9"),
        ([], ""),
        ([1, None, True, ["a"]], '1\nnull\ntrue\n["a"]'),
        ({"label": ["A", "B"], "n": None, "\u00e9": "\u00e9"}, '{"label": ["A", "B"], "n": null, "\u00e9": "\u00e9"}'),
        ([{"day": date(2026, 3, 4), "price": Decimal("1.50")}], '{"day": "2026-03-04", "price": "1.50"}'),
        (date(2026, 3, 4), "2026-03-04"),
    ],
)
def test_lists_and_objects_are_written_to_be_read(value: Any, text: str) -> None:
    assert PromptTemplate("<{v}>").fill({"v": value}) == f"<{text}>"


@pytest.mark.parametrize(
    ("values", "code", "words"),
    [
        ({}, ErrorCode.MISSING_PROMPT, "column 'q' of input.template is missing or null"),
        ({"q": None}, ErrorCode.MISSING_PROMPT, "column 'q' of input.template is missing or null"),
        ({"q": b"x"}, ErrorCode.WRONG_TYPE, "column 'q' of input.template holds bytes, not text"),
        ({"q": [{"a": b"x"}]}, ErrorCode.WRONG_TYPE, "column 'q' of input.template holds bytes, not text"),
    ],
)
def test_what_cannot_be_filled_in(values: dict[str, Any], code: ErrorCode, words: str) -> None:
    with pytest.raises(RowError) as caught:
        PromptTemplate("{q}").fill(values)
    assert (caught.value.code, caught.value.message) == (code, words)


@pytest.mark.parametrize("text", ["{q.}", "{.q}", "{q[0]}", "{q!r}", "{q:>10}", "{}", "{0}", "{q", "q}", "nothing"])
def test_only_names_are_allowed(text: str) -> None:
    with pytest.raises(JobError, match=r"^input\.template: "):
        PromptTemplate(text)


def test_a_dotted_name_reaches_no_attribute() -> None:
    with pytest.raises(RowError, match=r"'q\.__class__' of input.template is missing"):
        PromptTemplate("{q.__class__}").fill({"q": "x"})
