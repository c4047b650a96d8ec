from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from batchpipe.sample.rng import stream_of, uniforms


def test_streams_are_fixed_for_ever() -> None:
    # Resuming a job of an older version relies on these very numbers.
    assert stream_of(0, "a", 0) == 2395482867014657407
    assert uniforms(np.array([2395482867014657407]), np.array([3])).tolist() == [0.5226338567488532]


@given(st.integers(), st.text(), st.integers(0, 10_000))
def test_every_seed_and_id_has_a_63_bit_stream(seed: int, row_id: str, sample_index: int) -> None:
    assert 0 <= stream_of(seed, row_id, sample_index) < 2**63


def test_streams_differ_by_seed_id_and_sample() -> None:
    names = [(seed, row_id, sample) for seed in (0, 1, -1, 2**70) for row_id in ("1", "11", "") for sample in range(12)]
    assert len({stream_of(*name) for name in names}) == len(names)


@given(st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**40)), min_size=1, max_size=20))
def test_a_number_does_not_depend_on_its_neighbours(pairs: list[tuple[int, int]]) -> None:
    streams, positions = np.array(pairs, np.int64).T
    together = uniforms(streams, positions)
    alone = [uniforms(streams[i : i + 1], positions[i : i + 1])[0] for i in range(len(pairs))]
    assert together.tolist() == alone
    assert ((together > 0) & (together < 1)).all()


def test_numbers_are_even_along_a_stream_and_across_streams() -> None:
    many = np.arange(200_000)
    for numbers in (uniforms(np.array([77]), many), uniforms(many, np.array([0]))):
        counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
        chi_square = ((counts - 2000.0) ** 2 / 2000.0).sum()
        assert 60 < chi_square < 150  # 99 degrees of freedom
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.01
