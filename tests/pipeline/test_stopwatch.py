"""How long a step takes, on a CPU and where a GPU's events say it."""

from __future__ import annotations

import pytest

from tests.gpu.fake_cuda import FakeGraph, fake_cuda  # isort: skip  # noqa: F401
from batchpipe.pipeline.device_names import device_name
from batchpipe.pipeline.stopwatch import Stopwatch


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_time_passes_until_it_is_stopped(device: str, fake_cuda: list[FakeGraph]) -> None:  # noqa: F811
    watch = Stopwatch(device)
    watch.stop()
    seconds = watch.seconds()
    assert 0 < seconds == watch.seconds()


def test_a_gpu_has_the_name_that_its_driver_gives(fake_cuda: list[FakeGraph]) -> None:  # noqa: F811
    assert device_name("cuda:0", 1) == "a card of the tests"
