"""Schedules: how much decoding and how much prefilling the next step holds. Pure functions over counts.

A schedule is a policy over one port (`View` to `StepShape`); the planner fills the shape with sequences and blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class View:
    """What a schedule may look at."""

    num_ready: int  # sequences that wait for their next token
    num_running: int  # all sequences that hold KV, those in flight included
    prefill_possible: bool  # a prompt is begun, or one waits for which there is room
    max_batches: int
    max_step_tokens: int
    max_batch_sequences: int


@dataclass(frozen=True, slots=True)
class StepShape:
    num_decodes: int
    num_prefill_tokens: int


Schedule = Callable[[View], StepShape]


def decode_share(view: View) -> int:
    """The decodes of one of the circulating batches, so that all batches hold the same number."""
    share = -(-view.num_running // view.max_batches)
    return min(view.num_ready, share, view.max_batch_sequences)


def hybrid(view: View) -> StepShape:
    """Decodes first, what is left of the step's tokens for pieces of prompts (Sarathi-Serve's chunked prefill)."""
    num_decodes = decode_share(view)
    return StepShape(num_decodes, max(0, view.max_step_tokens - num_decodes))


def separate(view: View) -> StepShape:
    """Only prefills while there is room for one, else only decodes (vLLM's first scheduler)."""
    if view.prefill_possible:
        return StepShape(0, view.max_step_tokens)
    return StepShape(decode_share(view), 0)


SCHEDULES: dict[str, Schedule] = {"hybrid": hybrid, "separate": separate}
