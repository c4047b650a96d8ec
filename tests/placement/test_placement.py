"""What is decided about a machine before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from batchpipe.cost.roofline import RooflineCost
from batchpipe.errors import JobError, MemoryLimitError
from batchpipe.job.spec import EngineSpec
from batchpipe.model.describe import ModelInfo, describe_model
from batchpipe.pipeline.memory import StageMemory
from batchpipe.placement import machine as machines
from batchpipe.placement import placement as placements
from batchpipe.placement.machine import Machine, this_machine
from batchpipe.placement.placement import Placement, place, place_on
from batchpipe.placement.stage_split import split_stages
from tests.model.test_describe import LLAMA_70B
from tests.tiny_models import tiny_model

MIB, GIB = 1 << 20, 1 << 30
# Two stages, three times.
GPUS = Machine("GPU", num_gpus=6, free_bytes=GIB, host_free_bytes=8 * GIB)
CPU = Machine("CPU", num_gpus=None, free_bytes=2 * GIB, host_free_bytes=2 * GIB)


@pytest.fixture(scope="module")
def info() -> ModelInfo:
    """A tiny model with eight layers, four on each of two stages."""
    found = describe_model(tiny_model("llama"), "float32")
    twice = {name: getattr(found, name) * 2 for name in ("layer_weight_bytes", "layer_flops")}
    return replace(found, num_layers=8, **twice)


@pytest.fixture(autouse=True)
def no_profiles(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHPIPE_CACHE", str(tmp_path_factory.mktemp("cache")))


def engine(**keys: Any) -> EngineSpec:
    given: dict[str, Any] = {"num_stages": 2, "block_tokens": 16, "kv_device_memory": "1MiB", "kv_host_memory": "1GiB"}
    return EngineSpec(**(given | keys))


def test_a_placement_says_all_that_a_run_needs(info: ModelInfo) -> None:
    found = place(GPUS, engine(offload="batch"), info)
    assert (found.split.device, found.split.layers, found.split.num_replicas) == ("cuda", (range(4), range(4, 8)), 3)
    block_bytes = 4 * info.kv_bytes_per_token_layer * 16
    assert (found.block_tokens, found.capacity.num_blocks) == (16, MIB // block_bytes)
    assert (found.capacity.num_host_blocks, found.capacity.max_batches) == (GIB // block_bytes, 3)
    assert found.kv_bytes_per_stage == (MIB // block_bytes * block_bytes,) * 2
    assert sum(found.weight_bytes_per_stage) == info.weight_bytes
    assert (found.offload.mode, found.capacity.offload) == ("batch", "batch")


@pytest.mark.parametrize(
    ("keys", "reason"),
    [({"kv_host_memory": 0}, "engine.kv_host_memory is 0"), ({"offload": "none"}, "engine.offload is none")],
)
def test_without_a_second_tier_host_memory_is_not_looked_at(info: ModelInfo, keys: dict[str, Any], reason: str) -> None:
    found = place(replace(GPUS, host_free_bytes=0), engine(**keys), info)
    assert (found.offload.mode, found.offload.reason) == ("none", reason)
    assert (found.capacity.num_host_blocks, found.capacity.max_batches) == (0, 2)


def test_host_memory_of_all_stages_and_replicas_is_looked_for_before_loading(info: ModelInfo) -> None:
    with pytest.raises(MemoryLimitError, match=r"12.00 GiB for 6 of them, and 8.00 GiB are free.*to 1365MiB or less"):
        place(GPUS, engine(kv_host_memory="2GiB"), info)
    unknown = replace(GPUS, host_free_bytes=None)
    assert place(unknown, engine(kv_host_memory="2GiB"), info).offload.mode == "layer"


def test_on_the_cpu_weights_and_device_kv_come_off_first(info: ModelInfo) -> None:
    assert place(CPU, engine(kv_host_memory="900MiB"), info).offload.mode == "layer"
    with pytest.raises(MemoryLimitError, match="lower engine.kv_host_memory"):
        place(CPU, engine(kv_device_memory="200MiB", kv_host_memory="900MiB"), info)
    with pytest.raises(MemoryLimitError, match="lower engine.kv_host_memory"):
        place(CPU, engine(kv_host_memory="1023MiB"), info)


def test_weights_that_do_not_fit_are_named(info: ModelInfo) -> None:
    with pytest.raises(MemoryLimitError, match="ask for more stages"):
        place(replace(GPUS, free_bytes=1000), engine(), info)


def test_memory_without_room_for_one_block_is_told_with_the_keys(info: ModelInfo) -> None:
    message = (
        r"one KV block of 16 tokens takes 0\.01 MiB and there is room for 0\.00 MiB; raise engine\.kv_device_memory"
    )
    with pytest.raises(MemoryLimitError, match=message):
        place(GPUS, engine(kv_device_memory="1KiB"), info)
    found = place(GPUS, engine(kv_device_memory="auto", kv_host_memory=0), info)
    with pytest.raises(MemoryLimitError, match=message):
        found.capacity_of([StageMemory(1024, stage.bytes_per_block, 16) for stage in found.stages])


def test_a_job_that_fits_the_device_whatever_its_rows_are_stays_there(info: ModelInfo) -> None:
    block_bytes = 4 * info.kv_bytes_per_token_layer * 16
    row_blocks = -(-info.max_context_tokens // 16)
    # Three replicas share 12 rows: 4 of them on each device.
    spec = engine(kv_device_memory=4 * row_blocks * block_bytes)
    assert place(GPUS, spec, info, 12).offload.mode == "none"
    assert place(GPUS, spec, info, 13).offload.mode == "layer"
    assert place(GPUS, spec, info).offload.mode == "layer"


def test_a_host_that_holds_no_more_than_the_device_is_not_used_or_refused(info: ModelInfo) -> None:
    block_bytes = 4 * info.kv_bytes_per_token_layer * 16
    sizes = {"kv_device_memory": 100 * block_bytes, "kv_host_memory": 100 * block_bytes}
    found = place(GPUS, engine(**sizes), info)
    assert (found.offload.mode, found.capacity.num_host_blocks) == ("none", 0)
    assert "engine.kv_host_memory holds 100 blocks and the device 100" in found.offload.reason
    for offload in ("batch", "layer"):
        assert place(GPUS, engine(**sizes, offload=offload), info).offload.mode == offload
        message = (
            f"engine.offload is {offload}; engine.kv_host_memory holds 99 blocks of KV and the device 100.*"
            r"raise engine.kv_host_memory to more than .* GiB, or lower engine.kv_device_memory below .* GiB"
        )
        with pytest.raises(MemoryLimitError, match=message):
            place(GPUS, engine(**sizes | {"kv_host_memory": 100 * block_bytes - 1}, offload=offload), info)


def test_the_reason_names_what_the_link_carries_where_it_is_known(
    info: ModelInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = place_on("2xl20", engine(), info)
    assert found.offload.mode == "layer"
    assert "the link carries" in found.offload.reason
    assert found.cost is not None and isinstance(found.cost.model, RooflineCost)
    monkeypatch.setattr(found.cost.model, "kv_links", ())
    monkeypatch.setattr(placements, "known_cost", lambda *_: found.cost)
    unknown = place_on("2xl20", engine(), info)
    assert (unknown.offload.mode, "the link" in unknown.offload.reason) == ("layer", False)


def test_a_model_without_weights_is_placed_on_hardware_by_its_name() -> None:
    info = describe_model(LLAMA_70B, "bfloat16", needs_weights=False)
    sizes = {"num_stages": 8, "kv_device_memory": "8GiB", "kv_host_memory": "32GiB"}
    found = place_on("8xrtx5090", EngineSpec.model_validate(sizes), info)
    assert (found.split.num_stages, found.split.num_replicas, found.block_tokens) == (8, 1, 16)
    # The last stage, with the head, has fewer layers; the largest block decides for all.
    block_bytes = max(map(len, found.split.layers)) * 16 * info.kv_bytes_per_token_layer
    assert (found.capacity.num_blocks, found.capacity.num_host_blocks) == (
        8 * GIB // block_bytes,
        32 * GIB // block_bytes,
    )
    assert found.offload.mode == found.capacity.offload != "none"
    assert "the link carries" in found.offload.reason
    assert found.cost is not None and found.cost.source.startswith("roofline of ")
    assert sum(found.weight_bytes_per_stage) == info.weight_bytes
    one_tier = place_on("8xrtx5090", EngineSpec.model_validate(sizes | {"offload": "none"}), info)
    assert (one_tier.offload.reason, one_tier.capacity.num_host_blocks) == ("engine.offload is none", 0)
    with pytest.raises(MemoryLimitError, match="8 x NVIDIA.* ask for more stages"):
        place_on("8xrtx5090", EngineSpec(num_stages=2), info)


def test_layers_that_are_too_few_to_stream_are_told(info: ModelInfo) -> None:
    with pytest.raises(JobError, match=r"one of 3 stages has 2 layers.*lower engine.num_stages"):
        place(GPUS, engine(num_stages=3, offload="layer"), info)
    assert place(GPUS, engine(offload="layer"), info).offload.mode == "layer"


@pytest.mark.parametrize("keys", [{"num_stages": 7}, {"num_stages": 4, "replicas": 2}, {"replicas": 4}])
def test_more_stages_than_gpus_are_refused(info: ModelInfo, keys: dict[str, Any]) -> None:
    with pytest.raises(JobError, match="GPU has 6 GPUs"):
        split_stages(GPUS, engine(**keys), info)


def test_auto_takes_the_fewest_stages_that_leave_half_of_the_memory_for_kv(info: ModelInfo) -> None:
    for share, expected in ((2.0, (1, 6)), (1.9, (2, 3)), (1.0, (2, 3)), (0.5, (6, 1)), (0.1, (6, 1))):
        gpus = replace(GPUS, free_bytes=int(share * info.weight_bytes))
        found = split_stages(gpus, EngineSpec(), info)
        assert (found.num_stages, found.num_replicas) == expected
    assert split_stages(CPU, EngineSpec(), info).num_pools == 1


def test_loaded_stages_change_the_number_of_blocks_and_nothing_else(info: ModelInfo) -> None:
    found: Placement = place(GPUS, engine(kv_device_memory="auto", kv_host_memory="64MiB"), info, 1 << 20)
    host_blocks = (64 << 20) // found.stages[0].bytes_per_block
    assert found.offload.mode == "none"  # the device alone holds more than the host
    small = [StageMemory(MIB, stage.bytes_per_block, 16) for stage in found.stages]
    loaded = found.capacity_of(small)
    assert (loaded.offload, loaded.num_host_blocks) == ("none", 0)
    assert loaded.num_blocks < host_blocks < found.capacity.num_blocks


def test_this_machine_is_asked_once_for_what_it_has_free(info: ModelInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def free_bytes(device: str) -> int:
        asked.append(device)
        return 5 * GIB

    monkeypatch.setattr(machines, "free_bytes", free_bytes)
    spec = engine(device="cpu", attention="reference", block_tokens="auto")
    found = place(this_machine(spec), spec, info)
    assert asked == ["cpu"]
    assert (found.machine.free_bytes, found.machine.host_free_bytes) == (5 * GIB, 5 * GIB)
    assert (found.split.num_stages, found.split.num_pools, found.block_tokens) == (2, 2, 16)


def test_no_more_kv_is_made_than_the_jobs_sequences_can_use(info: ModelInfo) -> None:
    alone = engine(kv_device_memory="auto", kv_host_memory=0)
    longest = info.max_context_tokens // 16
    assert place(CPU, alone, info, 3).capacity.num_blocks == 3 * longest
    unknown = place(CPU, alone, info).capacity.num_blocks
    assert place(CPU, alone, info, 1 << 30).capacity.num_blocks == unknown > 3 * longest
    asked = engine(kv_device_memory="1MiB", kv_host_memory=0)
    assert place(CPU, asked, info, 1).capacity == place(CPU, asked, info).capacity


def test_rows_that_were_read_meanwhile_say_how_much_kv_they_can_use(info: ModelInfo) -> None:
    asked_tokens: list[int] = []
    answers = iter([5, None, 0])

    def job_blocks(block_tokens: int) -> int | None:
        asked_tokens.append(block_tokens)
        return next(answers)

    found = place(CPU, engine(kv_device_memory="auto", kv_host_memory=0), info, 3, job_blocks)
    assert asked_tokens == []  # no row is waited for before the weights are loaded
    assert found.capacity_of(found.stages).num_blocks == 5
    assert found.capacity_of(found.stages) == found.capacity
    assert found.capacity_of(found.stages).num_blocks == 1  # no row can run
    assert asked_tokens == [16, 16, 16]
