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
        ({"num_stages": 1}, "layer", "layer by layer beside a step"),
        ({"num_stages": 1, "step_seconds": None, "needed_blocks": None}, "layer", "layer by layer beside a step"),
        ({"num_stages": 1, "on_gpu": True}, "layer", "layer by layer beside a step"),
        ({"num_stages": 1, "on_gpu": True, "step_seconds": None}, "none", "`batchpipe profile` measures both"),
        ({"num_stages": 1, "streams_per_block": 1}, "batch", "fewer than four layers"),
        ({"streams_per_block": 0, "step_seconds": None}, "batch", "fewer than four layers"),
        ({"step_seconds": None}, "layer", "layer by layer beside a step"),
        ({"link_bytes_per_second": None}, "layer", "layer by layer beside a step"),
        # 4 batches of K = (1000 + 3.75 * 10) / 4; whole batches: 5 of (1000 + 3 * 10) / 5.
        ({}, "layer", "the link carries 10 blocks in a step, so batches may have 1037 of 5000"),
        ({"streams_per_block": 0}, "batch", "so batches may have 1030 of 5000"),
        ({"needed_blocks": 1030.0}, "layer", "1030 of 1030"),
        ({"needed_blocks": None}, "layer", "1037 of 8000"),
        # With a fast link the device's room binds: K is M / 2 at most where whole batches are loaded.
        ({"link_bytes_per_second": 1e11}, "layer", "4750 of 5000"),
        ({"link_bytes_per_second": 1e11, "streams_per_block": 0}, "batch", "2500 of 5000"),
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


def test_host_memory_is_used_from_the_need_on_that_the_device_does_not_meet() -> None:
    modes = [choose_offload("auto", **(PIPELINE | {"needed_blocks": 10.0 * n})).mode for n in range(50, 200)]
    assert modes == ["none"] * 51 + ["layer"] * 99
