"""The tables hold what went into the steps: built from steps of known times they give these times back."""

from __future__ import annotations

import pytest

from batchpipe.cost.model import StepWork
from batchpipe.cost.profile_cost import TimedSteps
from batchpipe.profiling.steps import Shape, announcing, build_steps
from batchpipe.profiling.tables import (
    DECODES,
    HELD_OUT,
    PROMPTS,
    SHORT_PROMPTS,
    UNDRAWN,
    Timings,
    held_out_error,
    step_times,
)

NUM_LAYERS = 12
GREEDY_SECONDS = 1e-5


def true_seconds(shape: Shape, num_layers: int) -> float:
    """Straight lines throughout; only the attention within short prompts is no table's."""
    work = shape.work
    context = work.decode_context_tokens - work.num_decodes
    layer = 1e-4 + 2e-6 * work.num_tokens + 1e-7 * work.num_decodes + 1e-8 * context + 1e-9 * work.prefill_pairs
    head = 1e-3 + 2e-5 * work.num_drawn if work.num_drawn else 0.0
    return 5e-4 + 1e-6 * work.num_tokens + num_layers * layer + head + GREEDY_SECONDS * work.num_drawn


def timings() -> Timings:
    return Timings(
        one_layer_seconds={shape: true_seconds(shape, 1) for shape in SHORT_PROMPTS},
        num_layers=NUM_LAYERS,
        seconds={s: true_seconds(s, NUM_LAYERS) for s in (*SHORT_PROMPTS, *UNDRAWN, *DECODES, *PROMPTS, *HELD_OUT)},
        greedy_row_seconds=GREEDY_SECONDS,
        random_row_seconds=1e-4,
    )


def test_tables_give_back_what_went_in() -> None:
    times = step_times(timings())
    assert held_out_error(times, timings()).worst_error < 5e-3
    steps = TimedSteps(times)
    for shape in (Shape.decodes(77, 900), Shape.prompt(333), Shape.decodes(9, 0)):
        for num_layers in (1, 30):
            assert steps.seconds(shape.work, num_layers, is_last=True) == pytest.approx(
                true_seconds(shape, num_layers), rel=5e-3
            )


def test_the_error_of_tables_is_told() -> None:
    wrong = timings()
    off = {shape: seconds * (1.2 if shape in HELD_OUT else 1.0) for shape, seconds in wrong.seconds.items()}
    shifted = Timings(wrong.one_layer_seconds, NUM_LAYERS, off, GREEDY_SECONDS, 1e-4)
    error = held_out_error(step_times(shifted), shifted)
    assert error.num_steps == len(HELD_OUT)
    assert error.median_error == pytest.approx(1 - 1 / 1.2, rel=1e-3)


def test_noise_leaves_no_negative_time() -> None:
    noisy = timings()
    flat = Timings(dict.fromkeys(SHORT_PROMPTS, 1.0), NUM_LAYERS, dict.fromkeys(noisy.seconds, 0.5), 1.0, 1.0)
    times = step_times(flat)
    for table in (times.step_seconds, times.layer_seconds, times.head_seconds, times.prefill_attention_seconds):
        assert all(seconds >= 0 for _, seconds in table)


def test_short_prompts_are_even_and_never_a_single_token() -> None:
    assert Shape.short_prompts(1).query_tokens == (1,)
    assert Shape.short_prompts(17).query_tokens == (9, 8)
    assert Shape.short_prompts(513).num_tokens == 513
    assert set(Shape.short_prompts(513).query_tokens) == {15, 16}


def test_steps_are_of_their_shape() -> None:
    shape = Shape.decodes(3, 40) + Shape.prompt(5, 16)
    assert shape.work == StepWork(8, 3, 3, 123, 5 * 16 + 15)
    (step,) = build_steps([shape], num_blocks=4, block_tokens=16, vocabulary_size=10)
    assert StepWork.of_step(step) == shape.work
    assert step.block_tables.shape == (4, 3)
    assert step.block_tables.max() < 4
    assert [start.sequence_id for start in announcing(step, 6).started] == list(range(6))
