"""Measured curves: exact at every point, between neighbours in between, so that a staircase stays one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from batchpipe.cost.curve import Curve, Surface

POINTS = st.dictionaries(st.integers(1, 4096), st.floats(1e-6, 10.0), min_size=1, max_size=40).map(
    lambda points: sorted(points.items())
)


@given(points=POINTS, sizes=st.lists(st.floats(0.0, 5000.0)))
def test_a_curve_is_exact_at_points_and_bounded_between_them(
    points: list[tuple[int, float]], sizes: list[float]
) -> None:
    curve = Curve.of(points)
    assert [curve.at(size) for size, _ in points] == [seconds for _, seconds in points]
    for size in sizes:
        left = [seconds for at, seconds in points if at <= size][-1:] or [points[0][1]]
        right = [seconds for at, seconds in points if at >= size][:1] or [points[-1][1] * size / points[-1][0]]
        low, high = sorted((left[0], right[0]))
        assert low * (1 - 1e-9) <= curve.at(size) <= high * (1 + 1e-9)


def test_a_step_between_neighbours_is_kept() -> None:
    curve = Curve.of([(64, 1.0), (128, 1.0), (129, 1.5), (256, 1.5)])
    assert [curve.at(size) for size in (100, 128, 129, 200, 256)] == [1.0, 1.0, 1.5, 1.5, 1.5]


def test_a_surface_is_exact_at_its_points() -> None:
    surface = Surface((1, 4), (Curve.of([(0, 0.0), (10, 1.0)]), Curve.of([(0, 0.0), (10, 2.0), (20, 6.0)])))
    assert surface.at(1, 10) == 1.0
    assert surface.at(4, 20) == 6.0
    assert surface.at(2.5, 10) == 1.5
    assert surface.at(8, 10) == 4.0  # the last row's rate
    assert surface.at(1, 20) == 2.0
