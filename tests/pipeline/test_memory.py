"""Memory for KV: what is free, what fits, and what is said where it does not."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from batchpipe.errors import MemoryLimitError
from batchpipe.job.spec import EngineSpec
from batchpipe.model.describe import ModelInfo, describe_model
from batchpipe.pipeline.channel import Payload, SharedMemoryChannel
from batchpipe.pipeline.memory import StageMemory, container_free_bytes
from batchpipe.placement.capacity import kv_blocks, offered_capacity
from batchpipe.placement.memory import check_host_memory
from batchpipe.placement.offload_mode import OffloadMode
from batchpipe.placement.stage_split import StageSplit
from tests.tiny_models import tiny_model

MIB, GIB = 1 << 20, 1 << 30
LAYERS = (range(4), range(4, 7))
# Two stages of 4 and 3 layers: blocks of 4 and 3 MiB, 10 GiB free for all.
STAGES = [StageMemory(10 * GIB, 4 * MIB, 16), StageMemory(10 * GIB, 3 * MIB, 16)]
GPUS, CPU = StageSplit("cuda", LAYERS), StageSplit("cpu", LAYERS)


def engine(**keys: Any) -> EngineSpec:
    return EngineSpec(**({"kv_device_memory": "400MiB", "kv_host_memory": "1GiB"} | keys))


@pytest.fixture(scope="module")
def info() -> ModelInfo:
    return describe_model(tiny_model("llama"), "float32")


def test_both_tiers_have_the_same_number_of_blocks_on_every_stage(info: ModelInfo) -> None:
    capacity = offered_capacity(engine(), info, GPUS, STAGES, "batch")
    assert (capacity.num_blocks, capacity.num_host_blocks) == (100, 256)
    assert (capacity.streams_per_block, capacity.offload) == (1, "batch")  # the smaller stage has 3 layers


@pytest.mark.parametrize(("offload", "max_batches"), [("none", 2), ("layer", 2), ("batch", 3)])
def test_one_more_batch_circulates_where_loads_run_beside_the_batch_before(
    info: ModelInfo, offload: OffloadMode, max_batches: int
) -> None:
    assert offered_capacity(engine(), info, GPUS, STAGES, offload).max_batches == max_batches


def test_one_tier_has_no_host_blocks(info: ModelInfo) -> None:
    capacity = offered_capacity(engine(), info, GPUS, STAGES, "none")
    assert (capacity.num_host_blocks, capacity.streams_per_block, capacity.offload) == (0, 0, "none")


def test_the_device_gets_no_more_blocks_than_the_host_which_copies_them_all(info: ModelInfo) -> None:
    capacity = offered_capacity(engine(kv_host_memory="396MiB"), info, GPUS, STAGES, "batch")
    assert (capacity.num_blocks, capacity.num_host_blocks, capacity.offload) == (99, 99, "batch")


def test_on_the_cpu_both_tiers_come_out_of_one_memory(info: ModelInfo) -> None:
    auto = engine(kv_device_memory="auto", kv_host_memory="4GiB", max_batch_sequences=1 << 20)
    # Two stages share 10 GiB; 8 are the host tier's, and half of what is left is for the device's KV.
    assert kv_blocks(auto, info, CPU, STAGES, with_host=True) == (GIB // 2 // (4 * MIB), 1024)
    assert kv_blocks(auto, info, CPU, STAGES, with_host=False) == (5 * GIB // 2 // (4 * MIB), 0)
    asks = "asks for 4.00 GiB of host memory per stage, 8.00 GiB for 2 of them, and 7.00 GiB are free for it: 1.00 GiB"
    with pytest.raises(MemoryLimitError, match=f"{asks} are missing; lower engine.kv_host_memory to 3584MiB or less"):
        kv_blocks(engine(kv_device_memory="1.5GiB", kv_host_memory="4GiB"), info, CPU, STAGES, with_host=True)
    with pytest.raises(MemoryLimitError, match="lower engine.kv_device_memory"):
        kv_blocks(engine(kv_device_memory="6GiB", kv_host_memory="4GiB"), info, CPU, STAGES, with_host=True)


def test_what_fits_to_the_byte_is_no_error() -> None:
    check_host_memory(GIB, 3, 3 * GIB)
    with pytest.raises(MemoryLimitError, match="lower engine.kv_host_memory to 1023MiB or less"):
        check_host_memory(GIB, 3, 3 * GIB - 1)
    with pytest.raises(MemoryLimitError, match=r"0\.00 GiB are free for it.*to 0MiB or less"):
        check_host_memory(GIB, 3, -GIB)


STATISTICS = "anon 300\ninactive_file 40\nactive_file 2\nslab 3\n"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"memory.max": "1000\n", "memory.current": "345\n", "memory.stat": STATISTICS}, 697),
        ({"memory.max": "300\n", "memory.current": "345\n", "memory.stat": STATISTICS}, 0),
        ({"memory.max": "max\n"}, None),
        (
            {
                "memory/memory.limit_in_bytes": "1000\n",
                "memory/memory.usage_in_bytes": "345\n",
                "memory/memory.stat": STATISTICS,
            },
            697,
        ),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None),
        ({}, None),
    ],
)
def test_a_containers_limit_counts_all_its_processes_but_not_cached_files(
    tmp_path: Path, files: dict[str, str], free: int | None
) -> None:
    (tmp_path / "memory").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert container_free_bytes(tmp_path) == free


def test_memory_between_stages_does_not_count_against_dev_shm() -> None:
    fd = SharedMemoryChannel.make_memory(Payload(1024, 576, torch.float32))
    try:
        assert re.match(r"/memfd:", os.readlink(f"/proc/self/fd/{fd}"))
        assert os.fstat(fd).st_dev != os.stat("/dev/shm").st_dev
    finally:
        os.close(fd)
