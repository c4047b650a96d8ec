"""What a run decides about a machine before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from batchpipe.cost.hardware import load_hardware
from batchpipe.cost.model_shape import ModelShape
from batchpipe.cost.roofline import RooflineCost
from batchpipe.errors import JobError, MemoryLimitError
from batchpipe.job.spec import EngineSpec
from batchpipe.model.describe import ModelInfo, describe_model
from batchpipe.placement import machine
from batchpipe.placement.capacity import Layout
from batchpipe.placement.machine import Place, choose_kv, this_place
from tests.tiny_models import tiny_model

MIB, GIB = 1 << 20, 1 << 30
NUM_STAGES = 2


@pytest.fixture(scope="module")
def info() -> ModelInfo:
    """A tiny model, with eight layers."""
    found = describe_model(tiny_model("llama"), "float32")
    twice = {name: getattr(found, name) * 2 for name in ("layer_weight_bytes", "layer_costs")}
    return replace(found, num_layers=8, **twice)


@pytest.fixture
def gpus(info: ModelInfo) -> Place:
    """Two stages of four layers, three times."""
    layout = Layout("cuda", [range(4), range(4, 8)], num_replicas=3)
    return Place("GPU", layout, free_bytes=GIB, host_free_bytes=8 * GIB, block_tokens=16)


def engine(**keys: Any) -> EngineSpec:
    return EngineSpec(**({"kv_device_memory": "1MiB", "kv_host_memory": "1GiB"} | keys))


@pytest.mark.parametrize(
    ("keys", "reason"),
    [({"kv_host_memory": 0}, "engine.kv_host_memory is 0"), ({"offload": "none"}, "engine.offload is none")],
)
def test_without_host_memory_nothing_is_looked_at(
    info: ModelInfo, gpus: Place, keys: dict[str, Any], reason: str
) -> None:
    choice = choose_kv(engine(**keys), info, replace(gpus, free_bytes=0), None, None)
    assert (choice.mode, choice.reason) == ("none", reason)


def test_host_memory_of_all_stages_and_replicas_is_looked_for_before_loading(info: ModelInfo, gpus: Place) -> None:
    with pytest.raises(MemoryLimitError, match=r"12.00 GiB for 6 of them, and 8.00 GiB are free.*to 1365MiB or less"):
        choose_kv(engine(kv_host_memory="2GiB"), info, gpus, None, None)
    unknown = replace(gpus, host_free_bytes=None)
    assert choose_kv(engine(kv_host_memory="2GiB"), info, unknown, None, None).mode == "batch"


def test_on_the_cpu_weights_and_device_kv_come_off_first(info: ModelInfo, gpus: Place) -> None:
    place = replace(gpus, layout=replace(gpus.layout, device="cpu", num_replicas=1), free_bytes=2 * GIB)
    assert choose_kv(engine(kv_host_memory="900MiB"), info, place, None, None).mode == "batch"
    with pytest.raises(MemoryLimitError, match="lower engine.kv_host_memory"):
        choose_kv(engine(kv_device_memory="200MiB", kv_host_memory="900MiB"), info, place, None, None)
    with pytest.raises(MemoryLimitError, match="lower engine.kv_host_memory"):
        choose_kv(engine(kv_host_memory="1023MiB"), info, place, None, None)


def test_weights_that_do_not_fit_are_named(info: ModelInfo, gpus: Place) -> None:
    with pytest.raises(MemoryLimitError, match="ask for more stages"):
        choose_kv(engine(), info, replace(gpus, free_bytes=1000), None, None)


def test_a_job_that_fits_the_device_whatever_its_rows_are_stays_there(info: ModelInfo, gpus: Place) -> None:
    block_bytes = info.num_layers // NUM_STAGES * info.kv_bytes_per_token_layer * gpus.block_tokens
    row_blocks = -(-info.max_context_tokens // gpus.block_tokens)
    # Three replicas share 12 rows: 4 of them on each device.
    spec = engine(kv_device_memory=4 * row_blocks * block_bytes)
    assert choose_kv(spec, info, gpus, None, 12).mode == "none"
    assert choose_kv(spec, info, gpus, None, 13).mode == "batch"
    assert choose_kv(spec, info, gpus, None, None).mode == "batch"


def test_a_link_that_carries_less_than_is_needed_is_helped_by_layers(
    info: ModelInfo, gpus: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost = RooflineCost(load_hardware("2xl20"), ModelShape.of(info), gpus.layout.layers)
    choice = choose_kv(engine(), info, gpus, cost, None)
    assert choice.mode == "both"
    assert "the link carries" in choice.reason
    monkeypatch.setattr(cost, "kv_links", ())
    assert choose_kv(engine(), info, gpus, cost, None).mode == "batch"


def test_layers_that_are_too_few_to_stream_are_told(info: ModelInfo, gpus: Place) -> None:
    shallow = replace(gpus, layout=replace(gpus.layout, layers=[range(5), range(5, 8)]))
    with pytest.raises(JobError, match=r"one of 2 stages has 3 layers.*lower engine.num_stages"):
        choose_kv(engine(offload="layer"), info, shallow, None, None)
    assert choose_kv(engine(offload="layer"), info, gpus, None, None).mode == "layer"


def test_this_machine_tells_what_its_host_has_free(info: ModelInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda device: {"cpu": 5 * GIB}[device])
    place = this_place(EngineSpec(device="cpu", num_stages=NUM_STAGES, attention="reference"), info)
    assert (place.free_bytes, place.host_free_bytes) == (5 * GIB, 5 * GIB)
    assert (place.layout.num_stages, place.layout.num_pools) == (NUM_STAGES, NUM_STAGES)
