"""Measured curves: exact at every point, between neighbours in between, so that a staircase stays one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpipe.cost.curve import Curve, Surface
from batchpipe.cost.forward_curve import ForwardCurveCost, load_forward_curve
from batchpipe.cost.hardware import load_hardware
from batchpipe.cost.model import StepWork
from batchpipe.cost.model_shape import KNOWN_SHAPES
from batchpipe.errors import JobError

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


def curve_file(folder: Path, text: str) -> Path:
    path = folder / "curve.csv"
    path.write_text(text)
    return path


def test_a_forward_curve_makes_stages_and_reads_kv(tmp_path: Path) -> None:
    path = curve_file(tmp_path, "Total Length,Execute Time\n1,40.0\n2,44.0\n")
    geometry = KNOWN_SHAPES["Llama-2-13B"]
    cost = ForwardCurveCost.load(path, load_hardware("4xl20"), geometry, 4)
    assert cost.stage_seconds(0, StepWork(2, 2, 0, 0, 3)) == pytest.approx(0.011)
    kv_seconds = 1000 * 819_200 / (0.8 * 864e9)
    assert cost.stage_seconds(3, StepWork(1, 1, 1, 1000, 0)) == pytest.approx((0.040 + kv_seconds) / 4)
    assert cost.handoff_seconds(100) == pytest.approx(1e-5 + 100 * 5120 * 2 / (0.9 * 32e9))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "line 1: must be"),
        ("tokens,ms\n1,2\n", "line 1: must be"),
        ("Total Length,Execute Time\n", "no measurement"),
        ("Total Length,Execute Time\n1,2\n1,3\n", "line 3: tokens must increase"),
        ("Total Length,Execute Time\n1,fast\n", "line 2: '1,fast' is not"),
        ("Total Length,Execute Time\n1,nan\n", "line 2: tokens must increase from 1 and times be above 0"),
    ],
)
def test_a_wrong_curve_file_is_refused_by_line(tmp_path: Path, text: str, expected: str) -> None:
    path = curve_file(tmp_path, text)
    with pytest.raises(JobError) as refusal:
        load_forward_curve(path)
    assert str(path) in str(refusal.value)
    assert expected in str(refusal.value)
