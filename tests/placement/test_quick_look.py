from __future__ import annotations

import os
from pathlib import Path

import pytest

from batchpipe.placement import quick_look as looking
from batchpipe.placement.quick_look import Rates, quick_look


def test_a_look_is_kept_for_a_day_and_a_damaged_one_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHPIPE_CACHE", str(tmp_path))
    looks = []

    def look(dtype: str) -> Rates:
        looks.append(dtype)
        return Rates(float(len(looks)), 5.0)

    monkeypatch.setattr(looking, "_look", look)
    assert (
        quick_look("some CPU, 2 threads", "float32") == quick_look("some CPU, 2 threads", "float32") == Rates(1.0, 5.0)
    )
    assert (
        quick_look("some CPU, 2 threads", "bfloat16")
        == quick_look("some CPU, 2 threads", "bfloat16")
        == Rates(2.0, 5.0)
    )
    path = tmp_path / "looks" / "some_CPU_2_threads-float32.json"
    path.write_text("{")
    assert quick_look("some CPU, 2 threads", "float32") == Rates(3.0, 5.0)
    os.utime(path, (0, 0))
    assert quick_look("some CPU, 2 threads", "float32") == Rates(4.0, 5.0)
    assert looks == ["float32", "bfloat16", "float32", "float32"]
