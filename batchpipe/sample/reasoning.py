"""Takes a completion apart into its reasoning and its answer, by the two markers around the reasoning."""

from __future__ import annotations

from dataclasses import dataclass

# The markers that chat templates use, by which `auto` finds the model's.
KNOWN_MARKERS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
)


@dataclass(frozen=True, slots=True)
class ReasoningMarkers:
    begin: str
    end: str

    def split(self, prompt_tail: str, text: str) -> tuple[str | None, str]:
        """(the reasoning without white space around it, the answer); None where the completion has no reasoning.

        A template may begin the reasoning in the prompt, whose last characters are `prompt_tail`. Reasoning that does
        not end leaves an empty answer.
        """
        begins_inside = prompt_tail.rfind(self.begin) > prompt_tail.rfind(self.end)
        head, begin, rest = text.partition(self.begin)
        if begin and not head.strip():
            inner = rest
        elif begins_inside or self.end in text:
            inner = text
        else:
            return None, text
        reasoning, _, answer = inner.partition(self.end)
        return reasoning.strip(), answer.lstrip()


def markers_of_template(chat_template: str) -> ReasoningMarkers | None:
    """The markers that a chat template names; None if it names none that are known."""
    for begin, end in KNOWN_MARKERS:
        if begin in chat_template and end in chat_template:
            return ReasoningMarkers(begin, end)
    return None
