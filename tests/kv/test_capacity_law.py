"""The capacity law against worked cases."""

from __future__ import annotations

import pytest

from batchpipe.kv.capacity_law import BATCH_BUFFERS, batch_capacity_blocks


@pytest.mark.parametrize(
    ("device", "budget", "num_batches", "num_buffers", "expected"),
    [
        (8000, 0, 8, BATCH_BUFFERS, 1000),  # without a link each batch has its share of the device
        (9600, 1140, 8, BATCH_BUFFERS, 1200 * (1 + 6 * 1.14 / 9.6)),  # 8 x RTX 5090, Llama-2-70B, a step of 22 ms
        (8000, 10**6, 8, BATCH_BUFFERS, 4000),  # two batches' loads fill the device
        (2000, 500, 2, BATCH_BUFFERS, 1000),  # two stages gain nothing by whole batches
        (2000, 500, 2, 0.2, 1450),  # but by ten groups of layers
        (2000, 500, 1, 0.2, 2400),  # one stage, too
    ],
)
def test_blocks_of_a_batch(device: float, budget: float, num_batches: int, num_buffers: float, expected: float) -> None:
    assert batch_capacity_blocks(device, budget, num_batches, num_buffers) == pytest.approx(expected)
