"""Reasoning and answer, taken apart by their markers."""

from __future__ import annotations

import pytest

from batchpipe.sample.reasoning import ReasoningMarkers, markers_of_template

MARKERS = ReasoningMarkers("<think>", "</think>")


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "answer"),
    [
        ("assistant\n", "<think>\nwhy\n</think>\n\nyes", "why", "yes"),
        ("assistant\n<think>\n", "why\n</think>\n\nyes", "why", "yes"),
        ("assistant\n<think>\n\n</think>\n\n", "yes", None, "yes"),
        ("assistant\n", "yes", None, "yes"),
        ("assistant\n", "  <think>cut", "cut", ""),
        ("assistant\n<think>", "cut", "cut", ""),
        ("assistant\n", "why</think>yes", "why", "yes"),  # the template's begin lies further back than the tail
        ("assistant\n", "see <think>x</think>", "see <think>x", ""),
        ("assistant\n", "<think></think> yes ", "", "yes "),
        ("", "", None, ""),
    ],
)
def test_split(prompt: str, text: str, reasoning: str | None, answer: str) -> None:
    assert MARKERS.split(prompt, text) == (reasoning, answer)


def test_markers_of_a_template() -> None:
    assert markers_of_template("{{ '<think>' }} x {{ '</think>' }}") == MARKERS
    assert markers_of_template("<think> without an end") is None
    assert markers_of_template("") is None
