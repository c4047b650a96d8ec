"""From timed steps to a profile's tables: each is a difference between steps that differ in one thing.

The time of short prompts with L layers less that of the same with one gives a layer; what is left of the one is the
stage's own. Decodes and long prompts less as many tokens of short prompts give attention, rows that draw less rows that
do not the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from batchpipe.cost.linear_fit import fit_decodes
from batchpipe.cost.profile import ProfiledError, ProfiledFit, StepTimes
from batchpipe.cost.profile_cost import TimedSteps
from batchpipe.profiling.steps import Shape

# Powers of two, and both sides of the edges of tiles.
STEP_TOKENS = (
    1,
    2,
    4,
    8,
    16,
    17,
    32,
    33,
    48,
    64,
    65,
    80,
    96,
    112,
    128,
    129,
    160,
    192,
    256,
    257,
    320,
    384,
    512,
    513,
    768,
    1024,
)
NUM_DECODES = (1, 8, 16, 32, 48, 64, 96, 128, 192, 256)
CONTEXT_TOKENS = (64, 256, 1024)
PROMPT_TOKENS = (16, 32, 64, 128, 256, 512, 1024)

SHORT_PROMPTS = tuple(map(Shape.short_prompts, STEP_TOKENS))
UNDRAWN = tuple(Shape.decodes(num, 0, drawn=False) for num in NUM_DECODES)
DECODES = tuple(Shape.decodes(num, context) for num in NUM_DECODES for context in (0, *CONTEXT_TOKENS))
PROMPTS = tuple(Shape.prompt(num_tokens) for num_tokens in PROMPT_TOKENS)
# In no table: what the tables say of these steps is the profile's error.
HELD_OUT = (
    Shape.decodes(4, 100),
    Shape.decodes(24, 500),
    Shape.decodes(40, 40),
    Shape.decodes(56, 300),
    Shape.decodes(100, 700),
    Shape.decodes(160, 120),
    Shape.decodes(200, 400),
    Shape((150, 150, 150), (0, 0, 0), 3),
    Shape.prompt(200),
    Shape.prompt(700),
    Shape.prompt(100, 400),
    Shape.decodes(32, 400) + Shape.prompt(224),
    Shape.decodes(128, 150) + Shape.prompt(96),
)


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of steps on a stage of one layer (`SHORT_PROMPTS`) and of `num_layers`, both with embedding and head.

    `seconds` lacks the shapes that are longer than the model's context.
    """

    one_layer_seconds: Mapping[Shape, float]
    num_layers: int
    seconds: Mapping[Shape, float]
    greedy_row_seconds: float
    random_row_seconds: float


def step_times(timings: Timings) -> StepTimes:
    """The tables. A difference that noise made negative counts as nothing."""
    took, num_layers = timings.seconds, timings.num_layers
    alone = {shape.num_tokens: timings.one_layer_seconds[shape] for shape in SHORT_PROMPTS}
    short = {shape.num_tokens: took[shape] for shape in SHORT_PROMPTS}
    layer = {
        tokens: max(0.0, short[tokens] - alone[tokens]) / (num_layers - 1) if num_layers > 1 else alone[tokens]
        for tokens in STEP_TOKENS
    }
    drawing = {shape.num_sequences: took[Shape.decodes(shape.num_sequences, 0)] - took[shape] for shape in UNDRAWN}
    decode_attention: dict[int, tuple[tuple[float, float], ...]] = {
        num: tuple(
            (shape.context_tokens[0], max(0.0, took[shape] - drawing[num] - short[num]) / num_layers)
            for shape in DECODES
            if shape.num_sequences == num and shape in took
        )
        for num in NUM_DECODES
    }
    prefill_attention = tuple(
        (shape.work.prefill_pairs, max(0.0, took[shape] - short[shape.num_tokens]) / num_layers)
        for shape in PROMPTS
        if shape in took
    )
    return StepTimes(
        step_seconds=tuple((tokens, max(0.0, alone[tokens] - layer[tokens])) for tokens in STEP_TOKENS),
        layer_seconds=tuple(layer.items()),
        head_seconds=tuple(
            (num, max(0.0, seconds - num * timings.greedy_row_seconds)) for num, seconds in drawing.items()
        ),
        decode_attention_seconds=decode_attention,
        prefill_attention_seconds=prefill_attention,
        greedy_row_seconds=timings.greedy_row_seconds,
        random_row_seconds=timings.random_row_seconds,
    )


def decode_fit(timings: Timings) -> ProfiledFit:
    """The straight-line model of the decode steps, on the stage that was measured."""
    shapes = [shape for shape in DECODES if shape in timings.seconds]
    fit = fit_decodes([shape.work for shape in shapes], [timings.seconds[shape] for shape in shapes])
    return ProfiledFit(
        alpha=fit.alpha,
        beta=fit.beta,
        delta=fit.delta,
        median_error=fit.median_error,
        worst_error=fit.worst_error,
    )


def held_out_error(times: StepTimes, timings: Timings) -> ProfiledError:
    """How far the tables are from steps that are in none of them."""
    steps = TimedSteps(times)
    errors = [
        abs(steps.seconds(shape.work, timings.num_layers, is_last=True) / timings.seconds[shape] - 1.0)
        for shape in HELD_OUT
        if shape in timings.seconds
    ]
    return ProfiledError(num_steps=len(errors), median_error=float(np.median(errors)), worst_error=max(errors))
