"""Rooflines: known sizes, and steps by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from batchpipe.cost.hardware import load_hardware
from batchpipe.cost.model import KvLink, StepWork
from batchpipe.cost.roofline import RooflineCost
from tests.cost.published_shapes import KNOWN_SHAPES


@pytest.mark.parametrize(
    ("name", "billions", "kv_bytes_per_token"),
    [
        ("Llama-2-13B", 13.0, 819_200),
        ("Llama-2-70B", 69.0, 327_680),
        ("Llama-3.1-8B", 8.0, 131_072),
        ("Qwen2.5-32B", 32.8, 262_144),
        ("Mixtral-8x7B", 46.7, 131_072),
    ],
)
def test_known_models_have_their_published_sizes(name: str, billions: float, kv_bytes_per_token: int) -> None:
    geometry = KNOWN_SHAPES[name]
    parameters = (sum(geometry.layer_weight_bytes) + 2 * geometry.head_weight_bytes) / 2
    assert parameters == pytest.approx(billions * 1e9, rel=0.01)
    assert geometry.kv_bytes_per_token == kv_bytes_per_token


def test_a_stage_reads_its_weights_and_computes_by_hand() -> None:
    hardware, geometry = load_hardware("l20"), KNOWN_SHAPES["Llama-2-13B"]
    cost = RooflineCost.pipeline(hardware, geometry, 1)
    one = cost.stage_seconds(0, StepWork(1, 0, 0, 0, 0))
    assert one == pytest.approx(sum(geometry.layer_weight_bytes) / (0.8 * 864e9))
    many = cost.stage_seconds(0, StepWork(4096, 0, 0, 0, 0))
    assert many == pytest.approx(4096 * sum(geometry.layer_flops) / (0.88 * 119.5e12))
    kv = cost.stage_seconds(0, StepWork(1, 0, 1, 10_000, 0)) - one
    assert kv == pytest.approx(10_000 * geometry.kv_bytes_per_token / (0.8 * 864e9))
    pairs = cost.stage_seconds(0, StepWork(1, 0, 0, 0, 10_000_000)) - one
    assert pairs == pytest.approx(1e7 * 4 * 5120 * 40 / (0.88 * 119.5e12))


def test_stages_together_are_the_whole_and_the_last_has_the_head() -> None:
    hardware, geometry = load_hardware("4xl20"), KNOWN_SHAPES["Qwen2.5-32B"]
    whole, stages = RooflineCost.pipeline(hardware, geometry, 1), RooflineCost.pipeline(hardware, geometry)
    assert stages.num_stages == 4
    work = StepWork.decode(64, 64 * 300)
    parts = [stages.stage_seconds(stage, work) for stage in range(4)]
    assert sum(parts) == pytest.approx(whole.stage_seconds(0, work))
    undrawn = replace(work, num_drawn=0)
    assert [a > b for a, b in zip(parts, (stages.stage_seconds(s, undrawn) for s in range(4)), strict=True)] == [
        False,
        False,
        False,
        True,
    ]


def test_shards_divide_the_work_and_pay_for_sums() -> None:
    hardware, geometry = load_hardware("4xl20"), KNOWN_SHAPES["Llama-2-13B"]
    whole, shards = RooflineCost.pipeline(hardware, geometry, 1), RooflineCost.tensor_parallel(hardware, geometry)
    work = StepWork(1024, 0, 0, 0, 1024 * 1025 // 2)
    sums = 40 * 2 * (1024 * 5120 * 2 / 14.65e9 + 1e-5)
    assert shards.stage_seconds(0, work) == pytest.approx(whole.stage_seconds(0, work) / 4 + sums)


def test_a_stages_link_carries_the_kv_of_its_layers() -> None:
    hardware, geometry = load_hardware("4xl20"), KNOWN_SHAPES["Qwen2.5-32B"]
    stages, shards = RooflineCost.pipeline(hardware, geometry), RooflineCost.tensor_parallel(hardware, geometry)
    assert stages.kv_links[0].load_bytes_per_second == 0.9 * 32e9
    assert sum(link.kv_bytes_per_token for link in stages.kv_links) == geometry.kv_bytes_per_token
    # Each of four devices has a link of its own, and a quarter of the heads.
    assert shards.kv_links == (KvLink(4 * 0.9 * 32e9, 4 * 0.9 * 32e9, geometry.kv_bytes_per_token_layer, 64),)


def test_few_rows_touch_few_experts() -> None:
    hardware, geometry = load_hardware("h200"), KNOWN_SHAPES["Mixtral-8x7B"]
    cost = RooflineCost.pipeline(hardware, geometry, 1)
    one, many = (cost.stage_seconds(0, StepWork(rows, 0, 0, 0, 0)) for rows in (1, 64))
    assert many > 3 * one  # two experts of eight, and attention
    assert many == pytest.approx(sum(geometry.layer_weight_bytes) / (0.8 * 4800e9), rel=1e-3)
