"""PipeMax's claim (arXiv 2605.02189) and what is ours, replayed on rooflines. The last line is JSON.

    python benchmarks/pipemax.py DATA_FOLDER

Llama-2-70B over eight stages, cards without NVLink: RTX 5090 with PCIe 5, L20 with PCIe 4. Lengths keep a published
trace's shape and have the means that the paper states, or the trace's own. All systems get the same requests, cost
model and memory. TD-Pipe and the schedule `temporal`, with all KV on the device, run in batchpipe's own simulator
with its own planner; what moves KV to the host runs in `plan.circulation`, without any prediction of lengths.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np
from replay_cases import EOS_TOKEN_ID, Lengths, ReplayPredictor, columns_of, read_lengths, requests_of

from batchpipe.execute.simulate import SimulatedPipeline
from batchpipe.plan.circulation import Circulation, Manner, Tiers, Window
from batchpipe.plan.circulation_clock import CirculatedRun, Rates, run_circulation
from batchpipe.plan.geometry import KNOWN_GEOMETRIES
from batchpipe.plan.hardware import load_hardware
from batchpipe.plan.offload import DecodeTime, batch_capacity_blocks, prefetch_budget_bytes
from batchpipe.plan.roofline import RooflineCost
from batchpipe.simulate import simulate
from batchpipe.types import Capacity

MODEL = "Llama-2-70B"
MACHINES = ("8xrtx5090", "8xl20")
NUM_STAGES = 8
BLOCK_TOKENS = 16
MAX_STEP_TOKENS = 2048
MAX_SEQUENCES = 512
# As vLLM takes it: this part of a card's memory, less weights and what activations need.
MEMORY_SHARE = 0.9
ACTIVATION_BYTES = 2 << 30
# The paper does not state the host's memory: half a TiB, pinned, for eight cards.
HOST_BYTES_PER_STAGE = 64 << 30


@dataclass(frozen=True, slots=True)
class Workload:
    """Lengths of `trace`, stretched to these means; None: as they are."""

    trace: str
    mean_tokens: tuple[float, float] | None
    num_requests: int
    min_prompt_tokens: int = 4


WORKLOADS = {
    "sharegpt": Workload("etalon_sharegpt8k", (343.76, 237.20), 5000),
    "longbench": Workload("etalon_sharegpt8k", (2686.89, 101.78), 2000, min_prompt_tokens=1024),
    "bwb": Workload("etalon_bwb", None, 1500),
}


def lengths_of(data: Path, workload: Workload) -> Lengths:
    """All lengths of a workload, within a context of 4096 tokens."""
    if workload.mean_tokens is None:
        return read_lengths(data, workload.trace)
    columns = columns_of(data / f"traces/trace_{workload.trace}.csv.xz")
    prompt, output = (np.array(columns[name], np.float64) for name in ("in_tok", "out_tok"))
    kept = prompt >= workload.min_prompt_tokens
    prompt, output = prompt[kept], output[kept]
    context_tokens = KNOWN_CONTEXT_TOKENS
    for _ in range(20):  # cutting at the context moves the means
        prompt *= workload.mean_tokens[0] / prompt.mean()
        output *= workload.mean_tokens[1] / output.mean()
        output = np.clip(output, 4, context_tokens // 2)
        prompt = np.clip(prompt, 4, context_tokens - output)
    return Lengths(prompt.astype(np.int32), output.astype(np.int32), context_tokens)


KNOWN_CONTEXT_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Node:
    """A machine with the model's stages on it; the stage with the least room for KV decides for all."""

    cost: RooflineCost
    tiers: Tiers
    rates: Rates
    time: DecodeTime

    @classmethod
    def of(cls, machine: str) -> Node:
        hardware, geometry = load_hardware(machine), KNOWN_GEOMETRIES[MODEL]
        cost = RooflineCost.pipeline(hardware, geometry, NUM_STAGES)
        link = hardware.device.effective_link
        num_layers = geometry.num_layers // NUM_STAGES
        weight_bytes = sum(geometry.layer_weight_bytes[:num_layers]) + geometry.head_weight_bytes
        room = MEMORY_SHARE * hardware.device.memory_bytes - ACTIVATION_BYTES - weight_bytes
        block_bytes = BLOCK_TOKENS * num_layers * geometry.kv_bytes_per_token_layer
        tiers = Tiers(
            device_blocks=int(room) // block_bytes,
            host_blocks=HOST_BYTES_PER_STAGE // block_bytes,
            block_tokens=BLOCK_TOKENS,
            block_bytes=block_bytes,
            load_bytes_per_second=link.host_to_device_bytes_per_second,
        )
        rates = Rates(link.host_to_device_bytes_per_second, link.device_to_host_bytes_per_second, lambda index: 1.0)
        return cls(cost, tiers, rates, DecodeTime.of(cost, MAX_STEP_TOKENS))


PIPEMAX = Manner(
    num_batches=NUM_STAGES, window=Window.BATCH, num_groups=1, fixed_budget_blocks=None, rides=False, edge=False,
    corrected=False, max_step_tokens=MAX_STEP_TOKENS, max_batch_sequences=MAX_SEQUENCES,
)  # fmt: skip
# What is ours, one after the other on top of PipeMax.
LAYERS = replace(PIPEMAX, window=Window.LAYERS, num_groups=10)
ONE_MORE = replace(LAYERS, num_batches=NUM_STAGES + 1)
RIDES = replace(ONE_MORE, rides=True)
OURS = replace(RIDES, edge=True, corrected=True)


def circulate(node: Node, manner: Manner, lengths: Lengths, published: bool, rates: Rates | None = None) -> CirculatedRun:
    time = node.time.straightened(MAX_STEP_TOKENS // 8) if published else node.time
    prompt, output = lengths.prompt_tokens.astype(np.int64), lengths.output_tokens.astype(np.int64)
    circulation = Circulation(prompt, output, node.tiers, manner, time)
    return run_circulation(circulation, node.cost, rates or node.rates)
