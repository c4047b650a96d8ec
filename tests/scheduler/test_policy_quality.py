"""How good the schedules are, in virtual time: ratios of tokens per second on canned lengths, the same on any machine.

A change of a policy that costs throughput fails here, long before anyone measures it on a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest

from batchpipe.cost.model import KvLink, StepWork
from batchpipe.pipeline.simulated import SimulatedPipeline
from batchpipe.predict.base import Survival
from batchpipe.runner.simulate import simulate
from batchpipe.types import BoolArray, Capacity, Int32Array
from benchmarks.replay_cases import EOS_TOKEN_ID, Lengths, requests_of
from tests.cost.formula_cost import FormulaCost

BLOCK_TOKENS = 4
NUM_LAYERS = 10
BLOCK_BYTES = 1 << 18
CONTEXT_TOKENS = 1024
# (mean prompt, mean completion, spread of both as the deviation of their logarithms, rows).
WORKLOADS = {"chat": (60, 40, 0.7, 600), "long inputs": (400, 16, 0.3, 300), "long answers": (40, 120, 0.4, 300)}


@cache
def lengths_of(name: str) -> Lengths:
    prompt, output, spread, num_rows = WORKLOADS[name]
    random = np.random.default_rng(7)
    logs = random.normal(-(spread**2) / 2, spread, (2, num_rows))
    tokens = np.clip(np.array([[prompt], [output]]) * np.exp(logs), 4, 500).astype(np.int32)
    return Lengths(tokens[0], tokens[1], CONTEXT_TOKENS)


class KnownCurve:
    """One class of rows, whose survival curve is that of the workload: what a predictor has learned after a while."""

    def __init__(self, lengths: Lengths) -> None:
        tokens = np.sort(lengths.output_tokens)
        grid_tokens = np.arange(0, int(tokens[-1]) + 4, 4, dtype=np.int32)
        alive = 1 - np.searchsorted(tokens, grid_tokens, side="right") / len(tokens)
        self._survival = Survival(grid_tokens, alive[None, :])

    def classify(self, prompts: Sequence[Int32Array]) -> Int32Array:
        return np.zeros(len(prompts), np.int32)

    def observe(self, classes: Int32Array, num_tokens: Int32Array, ended: BoolArray) -> None:
        """The curve is known already."""

    def survival(self, running_classes: Int32Array, running_tokens: Int32Array) -> Survival:
        return self._survival


def stage_seconds(stage: int, work: StepWork) -> float:
    """A card that reads its weights in 10 ms, computes 256 tokens meanwhile, and reads 1 GB of KV in 1 ms."""
    return 0.010 * max(1.0, work.num_tokens / 256) + work.decode_context_tokens * BLOCK_BYTES / BLOCK_TOKENS / 1e12


def gigabytes_per_second(rate: float, num_stages: int) -> FormulaCost:
    """Of a link to the device; the way to the host is a fast one."""
    token_layer_bytes = BLOCK_BYTES // BLOCK_TOKENS // NUM_LAYERS
    links = (KvLink(rate * 1e9, 25e9, token_layer_bytes, NUM_LAYERS),) * num_stages
    return FormulaCost(stage_seconds, num_stages, handoff_seconds_per_token=1e-7, control_seconds=5e-4, kv_links=links)


@cache
def tokens_per_second(workload: str, schedule: str, offload: str, num_stages: int, link: float = 25.0) -> float:
    """Prompt and completion tokens a second. The device holds the KV of a part of the rows, the host that of all."""
    lengths = lengths_of(workload)
    requests, by_stream = requests_of(lengths)
    capacity = Capacity(
        num_blocks=1500 * num_stages,
        block_tokens=BLOCK_TOKENS,
        num_stages=num_stages,
        max_batches=num_stages + (offload == "batch"),
        max_step_tokens=1024,
        max_batch_sequences=128,
        num_host_blocks=0 if offload == "none" else 12_000 * num_stages,
        streams_per_block=0 if offload == "none" else NUM_LAYERS // 2,
        offload=offload,
    )
    pipeline = SimulatedPipeline(capacity, gigabytes_per_second(link, num_stages), by_stream, EOS_TOKEN_ID)
    run = simulate([pipeline], requests, schedule, predictor=KnownCurve(lengths))
    assert (run.num_failed, run.output_tokens) == (0, lengths.output_tokens.sum())
    return (run.prompt_tokens + run.output_tokens) / run.seconds


Setting = tuple[str, str]  # schedule, offload mode
OURS, OURS_ONE_TIER = ("temporal", "layer"), ("temporal", "none")
each_workload = pytest.mark.parametrize("workload", WORKLOADS)
each_number_of_stages = pytest.mark.parametrize("num_stages", [1, 4])


def ratio(workload: str, num_stages: int, ours: Setting, other: Setting, link: float = 25.0) -> float:
    return tokens_per_second(workload, *ours, num_stages, link) / tokens_per_second(workload, *other, num_stages, link)


@pytest.mark.parametrize(
    ("workload", "num_stages", "least"),
    [
        ("chat", 1, 1.0),
        ("long inputs", 1, 1.0),
        # Where weights are read longer than anything is computed, a preemption costs less than free memory.
        ("long answers", 1, 0.96),
        ("chat", 4, 1.0),
        ("long inputs", 4, 1.15),
        ("long answers", 4, 1.0),
    ],
)
def test_temporal_is_at_least_chunked_prefill(workload: str, num_stages: int, least: float) -> None:
    assert ratio(workload, num_stages, OURS_ONE_TIER, ("hybrid", "none")) >= least


@each_workload
@each_number_of_stages
def test_temporal_is_better_than_prefill_first_and_than_td_pipe_as_published(workload: str, num_stages: int) -> None:
    assert ratio(workload, num_stages, OURS_ONE_TIER, ("separate", "none")) >= 1.02
    assert ratio(workload, num_stages, OURS_ONE_TIER, ("temporal-published", "none")) >= 1.05


@each_workload
@each_number_of_stages
def test_layers_on_two_tiers_are_at_least_one_tier(workload: str, num_stages: int) -> None:
    assert ratio(workload, num_stages, OURS, OURS_ONE_TIER) >= 0.995


def test_layers_on_two_tiers_bring_what_the_device_lacks() -> None:
    assert ratio("long answers", 1, OURS, OURS_ONE_TIER) >= 1.2
    assert ratio("long inputs", 4, OURS, OURS_ONE_TIER) >= 1.15


@each_workload
@each_number_of_stages
def test_a_link_of_an_eighth_of_that_costs_little(workload: str, num_stages: int) -> None:
    assert ratio(workload, num_stages, OURS, OURS_ONE_TIER, link=3.0) >= 0.9


@each_workload
def test_in_pipelines_layers_are_at_least_whole_batches_and_better_than_pipemax_as_published(workload: str) -> None:
    assert ratio(workload, 4, OURS, ("temporal", "batch")) >= 1.0
    assert ratio(workload, 4, OURS, ("pipemax-published", "batch")) >= 1.1
