"""The engine with its KV on two tiers says what it says with all of it on the device, and what transformers says."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from batchpipe.job.spec import EngineSpec
from batchpipe.model.describe import describe_model
from batchpipe.pipeline.base import Pipeline
from batchpipe.pipeline.local import LocalPipeline
from batchpipe.pipeline.memory import StageMemory
from batchpipe.pipeline.multiprocess import MultiprocessPipeline
from batchpipe.pipeline.swap.copy_engine import EmulatedLink
from batchpipe.placement.open import stage_specs
from batchpipe.placement.stage_split import StageSplit, stage_layers
from batchpipe.runner.engine import Engine
from batchpipe.types import Capacity, FinishedRequest, Request
from tests.scheduler.drive import run_engine
from tests.scheduler.scheduler_cases import request, sampling
from tests.tiny_models import ARCHITECTURES, save_tiny_model
from tests.transformers_tokens import greedy_tokens

BLOCK_TOKENS = 4
BATCH_SEQUENCES = 16
STEP_TOKENS = 64
NUM_ROWS = 32
SHARED_TOKENS = 13  # with which two of three prompts begin: three blocks, and one token to copy
ROOMY_BLOCKS = 1000
SLOW = EmulatedLink(load_bytes_per_second=2e7, store_bytes_per_second=2e7)
_folder = tempfile.TemporaryDirectory(prefix="deep-models-")


@functools.cache
def deep_model(architecture: str) -> Path:
    """Four times as deep as the tiny one, so that each of four stages has layers enough to stream."""
    config = ARCHITECTURES[architecture]()
    config.num_hidden_layers *= 4
    config.layer_types = config.layer_types * 4
    return save_tiny_model(config, Path(_folder.name) / architecture)


def rows() -> list[Request]:
    """Every fourth row is drawn at random, four times; the others are greedy."""
    random = np.random.default_rng(12)
    shared = random.integers(0, 256, SHARED_TOKENS)
    made = []
    for i in range(NUM_ROWS):
        own = random.integers(0, 256, random.integers(1, 14))
        tokens = np.concatenate([shared, own] if i % 3 else [own]).astype(np.int32)
        # The more tokens there are to draw from, the likelier a draw at the edge between two, which another order of
        # sums decides otherwise.
        drawn = {"n": 4, "temperature": 1.0, "top_k": 4} if i % 4 == 3 else {}
        params = sampling(max_tokens=int(random.integers(10, 21)), ignore_eos=True, **drawn)
        made.append(Request(request(i, 1).key, tokens, params))
    return made


def open_deep(
    architecture: str,
    num_stages: int,
    offload: str,
    num_blocks: int,
    num_host_blocks: int,
    *,
    link: EmulatedLink | None = None,
    workers: bool = False,
) -> Pipeline:
    engine = EngineSpec.model_validate(
        {"device": "cpu", "block_tokens": BLOCK_TOKENS, "max_step_tokens": STEP_TOKENS, "kv_verify": "all"}
    )
    info = describe_model(deep_model(architecture), "float32")
    split = StageSplit("cpu", stage_layers(info, num_stages))

    def offered(stages: Sequence[StageMemory]) -> Capacity:
        return Capacity(
            num_blocks=num_blocks,
            block_tokens=BLOCK_TOKENS,
            num_stages=num_stages,
            max_batches=num_stages + (offload == "batch"),
            max_step_tokens=STEP_TOKENS,
            max_batch_sequences=BATCH_SEQUENCES,
            num_host_blocks=num_host_blocks,
            streams_per_block=split.streams_per_block,
            offload=offload,
        )

    specs = stage_specs(engine, info, split, BLOCK_TOKENS, link=link)
    if not workers:
        return LocalPipeline(specs, offered)
    return MultiprocessPipeline.open([specs], offered)[0]


def generate(pipeline: Pipeline, schedule: str = "hybrid") -> tuple[list[FinishedRequest], Engine]:
    with pipeline:
        engine = Engine([pipeline], schedule, frozenset(), lambda params: None)
        finished = run_engine(engine, rows())
    scheduler = engine.replicas[0].scheduler
    assert scheduler.num_corrupt == 0
    assert scheduler.ledger.num_used == 0
    assert scheduler.swap is None or scheduler.swap.device_cache.num_used == 0
    return sorted(finished, key=lambda end: end.request.key.index), engine


def texts_of(finished: Sequence[FinishedRequest]) -> list[list[tuple[int, ...]]]:
    """By row, by sample."""
    assert [end.request.key.index for end in finished] == list(range(NUM_ROWS))
    return [[completion.token_ids for completion in end.completions] for end in finished]


@functools.cache
def all_resident(architecture: str, num_batches: int) -> tuple[list[list[tuple[int, ...]]], int]:
    """The texts with one tier, and the blocks that were used at most with so many batches in circulation."""
    finished, engine = generate(open_deep(architecture, num_batches, "none", ROOMY_BLOCKS, 0))
    scheduler = engine.replicas[0].scheduler
    assert scheduler.num_preemptions == 0
    return texts_of(finished), scheduler.peak_device_blocks


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_with_one_tier_it_is_what_transformers_says(architecture: str) -> None:
    texts, _ = all_resident(architecture, 1)
    assert texts == all_resident(architecture, 4)[0]
    greedy = [(row, own) for row, own in zip(rows(), texts, strict=True) if row.sampling.temperature == 0]
    most_tokens = max(row.sampling.max_tokens for row, _ in greedy)
    prompts = [row.prompt_token_ids.tolist() for row, _ in greedy]
    expected = greedy_tokens(deep_model(architecture), prompts, most_tokens)
    for (row, own), tokens in zip(greedy, expected, strict=True):
        assert own == [tokens[: row.sampling.max_tokens]]


@pytest.mark.parametrize("offload", ["batch", "layer"])
@pytest.mark.parametrize(
    ("percent", "num_stages", "architecture"),
    [(100, 1, "qwen3"), (50, 2, "gemma3"), (25, 3, "qwen3"), (25, 1, "gemma3"), (10, 4, "qwen3"), (10, 2, "qwen3")],
)
def test_any_part_of_the_kv_on_the_device(percent: int, num_stages: int, architecture: str, offload: str) -> None:
    # As many in circulation as there will be.
    num_batches = num_stages + (offload != "layer")
    expected, num_needed = all_resident(architecture, min(num_batches, 4))
    num_blocks = num_needed * percent // 100
    finished, engine = generate(open_deep(architecture, num_stages, offload, num_blocks, 2 * num_needed))
    assert texts_of(finished) == expected
    scheduler = engine.replicas[0].scheduler
    assert scheduler.num_preemptions == 0
    assert scheduler.peak_device_blocks <= num_blocks
    assert (engine.meter.measured(1.0)["host_to_device_bytes"] > 0) == (percent < 100)


@pytest.mark.parametrize("schedule", ["separate", "temporal"])
@pytest.mark.parametrize("offload", ["batch", "layer"])
def test_where_the_host_is_short_too_rows_are_computed_again(offload: str, schedule: str) -> None:
    expected, num_needed = all_resident("qwen3", 3)
    pipeline = open_deep("qwen3", 3, offload, num_needed // 10, num_needed // 3)
    finished, engine = generate(pipeline, schedule)
    assert texts_of(finished) == expected
    scheduler = engine.replicas[0].scheduler
    assert scheduler.peak_host_blocks <= num_needed // 3
    assert scheduler.num_preemptions > 0 or schedule == "temporal"


@pytest.mark.parametrize("offload", ["batch", "layer"])
def test_a_slow_link(offload: str) -> None:
    expected, num_needed = all_resident("qwen3", 2)
    finished, _ = generate(open_deep("qwen3", 2, offload, num_needed // 4, num_needed, link=SLOW))
    assert texts_of(finished) == expected


@pytest.mark.parametrize(("num_stages", "offload"), [(1, "batch"), (2, "layer")])
def test_in_processes(num_stages: int, offload: str) -> None:
    expected, num_needed = all_resident("qwen3", num_stages + 1)
    pipeline = open_deep("qwen3", num_stages, offload, num_needed // 8, num_needed // 2, workers=True)
    finished, engine = generate(pipeline)
    assert texts_of(finished) == expected
    assert engine.meter.measured(1.0)["host_to_device_bytes"] > 0
