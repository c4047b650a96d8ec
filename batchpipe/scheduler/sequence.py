"""The scheduler's own record of one sample on its way; nothing outside the scheduler sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from batchpipe.sample.on_device import samples_on_device
from batchpipe.types import (
    Completion,
    ErrorCode,
    FinishedRequest,
    FinishReason,
    Int32Array,
    Request,
    TokenLogprobs,
)


class StopMatcher(Protocol):
    """Watches one sequence's text for its stop strings."""

    def feed(self, token_id: int) -> int | None:
        """The number of characters of text to keep once a stop string has appeared, else None."""


@dataclass(slots=True)
class RequestGroup:
    """The samples of one request; it leaves as a whole when the last one ends."""

    request: Request
    completions: list[Completion | None]
    num_open: int

    def end(self, sample_index: int, completion: Completion) -> FinishedRequest | None:
        """One sample has ended; the whole request, if it was the last one."""
        self.completions[sample_index] = completion
        self.num_open -= 1
        if self.num_open > 0:
            return None
        completions = tuple(c for c in self.completions if c is not None)
        assert len(completions) == len(self.completions)
        return FinishedRequest(self.request, completions)


@dataclass(slots=True, eq=False)
class SequenceState:
    """One sample. The KV of `num_scheduled` tokens is written once the steps in flight are done."""

    sequence_id: int
    group: RequestGroup
    sample_index: int
    stream: int
    matcher: StopMatcher | None
    prompt: Int32Array
    num_tokens: int  # of prompt and generated text together
    max_tokens: int
    end_token_ids: frozenset[int]  # each of them ends the sequence
    length_class: int
    slot: int = -1
    admission: int = -1
    allocated_tokens: int = 0  # that its blocks hold
    num_shared_tokens: int = 0  # in blocks that it shares with others
    num_reused_tokens: int = 0  # with KV when it was admitted
    num_scheduled: int = 0
    last_step: int = -1  # that it is part of
    num_in_flight: int = 0
    num_unknown: int = 0  # tokens sampled by steps in flight
    sampled_row: int = -1  # of the last of them, among the tokens that its step samples
    is_ready: bool = False  # it stands in `SchedulerState.ready`
    is_closed: bool = False  # it has ended; a step in flight that ran ahead still has it
    is_corrupt: bool = False  # its KV is wrong, and steps in flight still read it
    generated: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def num_foreseen_tokens(self) -> int:
        """Of the sequence once the steps in flight are done, if it does not end with one of them."""
        return self.num_tokens + self.num_unknown

    @property
    def runs_ahead(self) -> bool:
        """Whether its next step can be made while the token that it begins with is only on the device."""
        is_last = len(self.generated) + self.num_unknown >= self.max_tokens
        return not is_last and samples_on_device(self.group.request.sampling)

    def token_slice(self, start: int, stop: int) -> Int32Array:
        """Tokens [start, stop) of prompt and generated text together."""
        num_prompt = len(self.prompt)
        if start >= num_prompt:
            return np.array(self.generated[start - num_prompt : stop - num_prompt], dtype=np.int32)
        head = self.prompt[start:stop]
        if stop <= num_prompt:
            return head
        return np.concatenate([head, np.array(self.generated[: stop - num_prompt], dtype=np.int32)])

    def accept(self, token_id: int) -> tuple[FinishReason, int | None] | None:
        """Takes a drawn token in. Where it ends the sequence: why, and how many characters to keep (None: all)."""
        self.generated.append(token_id)
        self.num_tokens += 1
        if token_id in self.end_token_ids:
            return FinishReason.STOP, None
        if self.matcher is not None and (text_length := self.matcher.feed(token_id)) is not None:
            return FinishReason.STOP, text_length
        return (FinishReason.LENGTH, None) if len(self.generated) >= self.max_tokens else None

    def completion(
        self,
        finish_reason: FinishReason | None,
        text_length: int | None = None,
        error: tuple[ErrorCode, str] | None = None,
    ) -> Completion:
        return Completion(
            token_ids=tuple(self.generated),
            finish_reason=finish_reason,
            text_length=text_length,
            logprobs=tuple(self.logprobs),
            error_code=error[0] if error else None,
            error_message=error[1] if error else None,
        )
