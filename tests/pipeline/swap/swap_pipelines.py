"""Small pipelines with two tiers of KV, programs of steps for them, and what these say with one tier."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from batchpipe.job.spec import EngineSpec
from batchpipe.model.describe import describe_model
from batchpipe.pipeline.base import Pipeline
from batchpipe.pipeline.local import LocalPipeline
from batchpipe.pipeline.multiprocess import MultiprocessPipeline
from batchpipe.pipeline.swap.copy_engine import EmulatedLink
from batchpipe.placement.open import stage_specs
from batchpipe.placement.stage_split import StageSplit, stage_layers
from batchpipe.types import Capacity, Step, StepResult
from tests.pipeline.swap.swap_programs import (
    BLOCK_TOKENS,
    MAX_STEP_TOKENS,
    NUM_BLOCKS,
    NUM_HOST_BLOCKS,
    Program,
    on_the_device,
)
from tests.tiny_models import tiny_model

NUM_STEPS = 25
MODES = {"loads": ("load",), "streams": ("stream",), "both": ("load", "stream")}
STREAMS_PER_BLOCK = {1: 2, 2: 1}  # the tiny model has four layers


def capacity_of(
    num_stages: int, max_batches: int, *, two_tiers: bool = True, num_host_blocks: int = NUM_HOST_BLOCKS
) -> Capacity:
    return Capacity(
        num_blocks=NUM_BLOCKS if two_tiers else NUM_HOST_BLOCKS,
        block_tokens=BLOCK_TOKENS,
        num_stages=num_stages,
        max_batches=max_batches,
        max_step_tokens=MAX_STEP_TOKENS,
        max_batch_sequences=8,
        num_host_blocks=num_host_blocks if two_tiers else 0,
        streams_per_block=STREAMS_PER_BLOCK.get(num_stages, 0) if two_tiers else 0,
    )


def open_pipeline(
    num_stages: int,
    max_batches: int,
    *,
    two_tiers: bool = True,
    attention: str = "reference",
    kv_verify: str = "all",
    link: EmulatedLink | None = None,
    workers: bool = False,
    num_host_blocks: int = NUM_HOST_BLOCKS,
) -> Pipeline:
    engine = EngineSpec.model_validate(
        {
            "device": "cpu",
            "block_tokens": BLOCK_TOKENS,
            "max_step_tokens": MAX_STEP_TOKENS,
            "max_batch_sequences": 8,
            "attention": attention,
        }
    )
    info = describe_model(tiny_model("qwen3"), "float32")
    specs = stage_specs(engine, info, StageSplit("cpu", stage_layers(info, num_stages)), BLOCK_TOKENS)
    specs = [replace(spec, kv_verify=kv_verify, link=link) for spec in specs]

    capacity = capacity_of(num_stages, max_batches, two_tiers=two_tiers, num_host_blocks=num_host_blocks)
    if not workers:
        return LocalPipeline(specs, lambda stages: capacity)
    return MultiprocessPipeline.open([specs], lambda stages: capacity)[0]


def run(pipeline: Pipeline, steps: Sequence[Step]) -> list[StepResult]:
    """As many in flight as the pipeline holds."""
    waiting = deque(steps)
    in_flight = 0
    results = []
    while waiting or in_flight:
        while waiting and in_flight < pipeline.capacity.max_batches:
            pipeline.submit(waiting.popleft())
            in_flight += 1
        results.append(pipeline.collect())
        in_flight -= 1
    return results


@functools.cache
def program(
    seed: int, num_stages: int, max_batches: int, mode: str, attention: str
) -> tuple[list[Step], list[StepResult]]:
    """Steps between two tiers, and what they say with one."""
    made = Program(seed, max_batches, STREAMS_PER_BLOCK.get(num_stages, 0), MODES[mode])
    steps = [made.next_step() for _ in range(NUM_STEPS)]
    with open_pipeline(num_stages, max_batches, two_tiers=False, attention=attention) as pipeline:
        return steps, run(pipeline, [on_the_device(step) for step in steps])


def assert_same(results: Sequence[StepResult], expected: Sequence[StepResult]) -> None:
    for result, other in zip(results, expected, strict=True):
        assert result.step_id == other.step_id
        assert result.token_ids.tolist() == other.token_ids.tolist()
        assert result.logprobs == other.logprobs  # to the last bit: the same KV in other places
        assert not result.corrupt
