from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from batchpipe.pipeline.model_runner.graphs import most_padded, padding_of


@given(st.integers(1, 1024), st.integers(0, 1024), st.integers(0, 5000), st.integers(0, 64))
def test_a_padding_holds_its_step(num_sequences: int, num_more: int, num_items: int, num_tiles: int) -> None:
    num_tokens = num_sequences + num_more
    padding = padding_of(num_tokens, num_sequences, num_items, num_tiles, has_long_decodes=True)
    assert padding is not None and padding.has_long_decodes
    assert num_tokens <= padding.num_tokens <= most_padded(max(num_tokens, 2048))
    assert num_sequences <= padding.num_sequences <= padding.num_tokens
    assert num_items <= padding.num_items and num_tiles <= padding.num_tiles
    assert (padding.num_items == 0, padding.num_tiles == 0) == (num_items == 0, num_tiles == 0)


def test_large_steps_are_not_recorded() -> None:
    assert padding_of(2049, 4, 0, 40, has_long_decodes=False) is None


def test_a_job_needs_few_recordings() -> None:
    """Of decodes alone, with up to 512 sequences and contexts of up to 4,096 tokens."""
    paddings = {
        padding_of(number, number, number * chunks, 0, has_long_decodes=chunks > 1)
        for number in range(1, 513)
        for chunks in range(1, 9)
    }
    assert len(paddings) <= 13 * 5
