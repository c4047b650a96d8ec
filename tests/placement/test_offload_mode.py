"""The choice of how KV comes back from host memory: a table of cases."""

from __future__ import annotations

from typing import Any

import pytest

from batchpipe.placement.offload_mode import choose_offload

# 1,000 blocks of 1 MB on the device; the link carries 10 of them in a step.
PIPELINE: dict[str, Any] = {
    "num_stages": 4,
    "device_blocks": 1000,
    "host_blocks": 8000,
    "needed_blocks": 5000.0,
    "step_seconds": 0.01,
    "link_bytes_per_second": 1e9,
    "block_bytes": 1_000_000,
    "streams_per_block": 4,
}


@pytest.mark.parametrize(
    ("changes", "mode", "words"),
    [
        ({"host_blocks": 0}, "none", "kv_host_memory is 0"),
        ({"host_blocks": 1000}, "none", "holds 1000 blocks and the device 1000"),
        ({"needed_blocks": 1000.0}, "none", "hold all that can run"),
        ({"num_stages": 1}, "layer", "one stage"),
        ({"num_stages": 1, "step_seconds": None, "needed_blocks": None}, "layer", "one stage"),
        ({"num_stages": 1, "streams_per_block": 1}, "batch", "fewer than four layers"),
        ({"streams_per_block": 0}, "batch", "fewer than four layers"),
        ({"step_seconds": None}, "batch", "not known"),
        ({"link_bytes_per_second": None}, "batch", "not known"),
        # 5 batches of K = (1000 + 3 * 10) / 5, and (1000 + 4.75 * 10) / 5 with layers beside.
        ({}, "both", "batches may have 1030 blocks, and 1048 if"),
        ({"needed_blocks": 1030.0}, "batch", "1030 of 1030"),
        ({"needed_blocks": None}, "both", "1048"),
        # A link so fast that the device's room is what binds: K is M / 2 at most, M * 4 with layers.
        ({"link_bytes_per_second": 1e11, "needed_blocks": 2500.0}, "batch", "2500 of 2500"),
        ({"link_bytes_per_second": 1e11, "needed_blocks": 2501.0}, "both", "2500 blocks, and 5750 if"),
        ({"link_bytes_per_second": 9e7}, "none", "carries 0 blocks in a step"),
    ],
)
def test_auto_goes_by_need_stages_and_link(changes: dict[str, Any], mode: str, words: str) -> None:
    choice = choose_offload("auto", **(PIPELINE | changes))
    assert choice.mode == mode
    assert words in choice.reason


@pytest.mark.parametrize("asked", ["none", "batch", "layer"])
def test_what_is_asked_for_is_obeyed(asked: str) -> None:
    for changes in ({}, {"num_stages": 1}, {"needed_blocks": 10.0}):
        choice = choose_offload(asked, **(PIPELINE | changes))
        assert (choice.mode, choice.reason) == (asked, f"engine.offload is {asked}")


def test_more_need_never_takes_a_mode_that_carries_less() -> None:
    order = ["none", "batch", "both"]
    modes = [choose_offload("auto", **(PIPELINE | {"needed_blocks": 10.0 * n})).mode for n in range(50, 200)]
    assert modes == sorted(modes, key=order.index)
    assert set(modes) == set(order)
