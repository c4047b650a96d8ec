"""PipeMax's claim (arXiv 2605.02189) and what is ours, replayed on rooflines. The last line is JSON.

    python benchmarks/pipemax.py DATA_FOLDER

Llama-2-70B over eight stages, cards without NVLink: RTX 5090 with PCIe 5, L20 with PCIe 4. Lengths keep a published
trace's shape and have the means that the paper states, or the trace's own. All systems get the same requests, cost
model and memory. TD-Pipe and the schedule `temporal`, with all KV on the device, run in batchpipe's own simulator
with its own scheduler; what moves KV to the host runs in `plan.circulation`, without any prediction of lengths.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from timeit import timeit

import numpy as np

from batchpipe.cost.hardware import load_hardware
from batchpipe.cost.model_shape import KNOWN_SHAPES
from batchpipe.cost.roofline import RooflineCost
from batchpipe.pipeline.simulated import SimulatedPipeline
from batchpipe.runner.simulate import simulate
from batchpipe.scheduler.offload.circulation import Circulation, Manner
from batchpipe.scheduler.offload.circulation_clock import Rates, run_circulation
from batchpipe.scheduler.offload.decode_time import DecodeTime
from batchpipe.scheduler.offload.residency import Tiers, Window
from batchpipe.scheduler.offload.selection import (
    Aim,
    Candidates,
    batch_capacity_blocks,
    pipeline_capacity_tokens,
    prefetch_budget_bytes,
    select,
)
from batchpipe.scheduler.policies.schedules import SCHEDULES
from batchpipe.scheduler.policies.td_pipe import TdPipe
from batchpipe.scheduler.state import SchedulerState
from batchpipe.types import Capacity
from benchmarks.replay_cases import EOS_TOKEN_ID, Lengths, ReplayPredictor, columns_of, read_lengths, requests_of

MODEL = "Llama-2-70B"
MACHINES = ("8xrtx5090", "8xl20")
NUM_STAGES = 8
BLOCK_TOKENS = 16
MAX_STEP_TOKENS = 2048
MAX_SEQUENCES = 512
CONTEXT_TOKENS = 4096
# Published estimates of time are lines fitted to batches up to this size.
LINE_SEQUENCES = 256
OCCUPANCIES = {"occupancy 0.9": 0.9, "occupancy 0.8": 0.8, "occupancy 0.6": 0.6}
PUBLISHED = ("temporal-published", *OCCUPANCIES)
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
    "longbench": Workload("etalon_sharegpt8k", (2686.89, 101.78), 1000, min_prompt_tokens=1024),
    "bwb": Workload("etalon_bwb", None, 400),
}


def lengths_of(data: Path, workload: Workload) -> Lengths:
    """All lengths of a workload, within a context of 4096 tokens."""
    if workload.mean_tokens is None:
        return read_lengths(data, workload.trace)
    columns = columns_of(data / f"traces/trace_{workload.trace}.csv.xz")
    prompt, output = (np.array(columns[name], np.float64) for name in ("in_tok", "out_tok"))
    kept = prompt >= workload.min_prompt_tokens
    prompt, output = prompt[kept], output[kept]
    for _ in range(20):  # cutting at the context moves the means
        prompt *= workload.mean_tokens[0] / prompt.mean()
        output *= workload.mean_tokens[1] / output.mean()
        output = np.clip(output, 4, CONTEXT_TOKENS // 2)
        prompt = np.clip(prompt, 4, CONTEXT_TOKENS - output)
    return Lengths(prompt.astype(np.int32), output.astype(np.int32), CONTEXT_TOKENS)


@dataclass(frozen=True, slots=True)
class Node:
    """A machine with the model's stages on it; the stage with the least room for KV decides for all."""

    cost: RooflineCost
    tiers: Tiers
    rates: Rates
    time: DecodeTime

    @classmethod
    def of(cls, machine: str) -> Node:
        hardware, geometry = load_hardware(machine), KNOWN_SHAPES[MODEL]
        cost = RooflineCost.pipeline(hardware, geometry, NUM_STAGES)
        link = hardware.device.effective_link
        num_layers = geometry.num_layers // NUM_STAGES
        room = min(room_bytes(machine))
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


def room_bytes(machine: str) -> list[float]:
    """Each stage's room for KV: the first one also holds the embedding, the last one the head."""
    geometry, memory = KNOWN_SHAPES[MODEL], load_hardware(machine).device.memory_bytes
    layers_bytes = sum(geometry.layer_weight_bytes[: geometry.num_layers // NUM_STAGES])
    ends = [geometry.head_weight_bytes if stage in (0, NUM_STAGES - 1) else 0 for stage in range(NUM_STAGES)]
    return [MEMORY_SHARE * memory - ACTIVATION_BYTES - layers_bytes - more for more in ends]


def watermark_gain(machine: str, slow_link_share: float) -> float:
    """KV of a batch with a watermark a stage, over the least of each for all; one middle stage's link is slow."""
    node, rooms = Node.of(machine), room_bytes(machine)
    budget = prefetch_budget_bytes(float(node.time.seconds(64, 0)), node.tiers.load_bytes_per_second)
    budgets = [float(budget) * (slow_link_share if stage == NUM_STAGES // 2 else 1.0) for stage in range(NUM_STAGES)]
    token_bytes = [node.tiers.block_bytes // BLOCK_TOKENS] * NUM_STAGES
    own = pipeline_capacity_tokens(rooms, budgets, token_bytes, NUM_STAGES, 2)
    least = pipeline_capacity_tokens([min(rooms)] * NUM_STAGES, [min(budgets)] * NUM_STAGES, token_bytes, NUM_STAGES, 2)
    return own / least


PIPEMAX = Manner(
    num_batches=NUM_STAGES, window=Window.BATCH, num_groups=1, fixed_budget_blocks=None, rides=False, edge=False,
    corrected=False, max_step_tokens=MAX_STEP_TOKENS, max_batch_sequences=MAX_SEQUENCES,
)  # fmt: skip
STATIC_SHARES = (0.05, 0.1, 0.25)
# What is ours, one thing after the other. Ten layers a stage, each a group.
LAYERS = replace(PIPEMAX, window=Window.LAYERS, num_groups=10)
RIDES = replace(LAYERS, rides=True)
ONE_MORE = replace(RIDES, num_batches=NUM_STAGES + 1)
OURS = replace(ONE_MORE, edge=True, corrected=True)
MANNERS = {"pipemax": PIPEMAX, "+layers": LAYERS, "+rides": RIDES, "+one_more": ONE_MORE, "ours": OURS}


class AtOccupancy(TdPipe):
    """TD-Pipe, but back to prefills where the KV in use falls below a part of the pool: its code's rule thrashes."""

    refill_below = 0.0

    def _prefill_pays(self, state: SchedulerState) -> bool:
        return state.ledger.num_used < self.refill_below * state.ledger.num_blocks


def resident(
    data: Path, node: Node, population: Lengths, lengths: Lengths, schedule: str, seed: int
) -> dict[str, float]:
    """A schedule of batchpipe with all KV on the device, in its own simulator."""
    requests, by_stream = requests_of(lengths)
    capacity = Capacity(node.tiers.device_blocks, BLOCK_TOKENS, NUM_STAGES, NUM_STAGES, MAX_STEP_TOKENS, MAX_SEQUENCES)
    pipeline = SimulatedPipeline(capacity, node.cost, by_stream, EOS_TOKEN_ID)
    predictor = ReplayPredictor(data, population, lengths, seed)
    run = simulate([pipeline], requests, schedule, predictor=predictor)
    assert run.output_tokens == lengths.output_tokens.sum(), "a request did not end at its length"
    decodes = [step.num_sequences for step in pipeline.steps if step.kind != "prefill"]
    return {
        "tokens_per_second": (run.prompt_tokens + run.output_tokens) / run.seconds,
        "seconds": run.seconds,
        "busy_share": statistics.mean(run.stage_utilization),
        "mean_decodes": statistics.mean(decodes),
    }


def circulated(node: Node, manner: Manner, lengths: Lengths, link_share: float = 1.0) -> dict[str, float]:
    """A manner of circulating; the link carries `link_share` of what the scheduler believes."""
    published = manner.window is Window.BATCH
    time = node.time.straightened(LINE_SEQUENCES) if published else node.time
    prompt, output = lengths.prompt_tokens.astype(np.int64), lengths.output_tokens.astype(np.int64)
    circulation = Circulation(prompt, output, node.tiers, manner, time)
    run = run_circulation(circulation, node.cost, replace(node.rates, share=lambda index: link_share))
    assert circulation.done and (circulation.residency.context_tokens == prompt + output - 1).all()
    second_quarter = slice(len(run.batch_blocks) // 4, len(run.batch_blocks) // 2)
    all_resident_blocks = node.tiers.device_blocks / manner.num_batches
    budget = prefetch_budget_bytes(float(np.mean(run.step_seconds[second_quarter])), node.tiers.load_bytes_per_second)
    budget_blocks = manner.fixed_budget_blocks or budget / node.tiers.block_bytes
    law = batch_capacity_blocks(node.tiers.device_blocks, budget_blocks, manner.num_batches, manner.num_buffers)
    return {
        "tokens_per_second": float((prompt + output).sum()) / run.seconds,
        "seconds": run.seconds,
        "busy_share": run.busy_seconds / run.seconds,
        "stall_share": run.stall_seconds / run.seconds,
        "load_share_of_link": run.loaded_bytes / run.seconds / node.rates.load_bytes_per_second,
        "store_share_of_link": run.stored_bytes / run.seconds / node.rates.store_bytes_per_second,
        "mean_decodes": float(np.mean(run.num_decodes)),
        # Both against a batch whose KV all stays on the device, in the second quarter of the decode steps.
        "batch_gain": float(np.mean(run.batch_blocks[second_quarter])) / all_resident_blocks,
        "batch_gain_by_law": float(law) / all_resident_blocks,
    }


def compare(data: Path, machine: str, workload: Workload, num_requests: int, seed: int) -> dict[str, object]:
    """Every system on the same requests, and the ratios that matter."""
    node, population = Node.of(machine), lengths_of(data, workload)
    lengths = population.draw(num_requests, seed)
    runs: dict[str, dict[str, float]] = {}
    for name in (*PUBLISHED, "temporal"):
        runs[name] = shown(name, resident(data, node, population, lengths, name, seed))
    for share in STATIC_SHARES:
        manner = replace(PIPEMAX, fixed_budget_blocks=int(share * node.tiers.device_blocks))
        runs[f"static {share}"] = shown(f"static {share}", circulated(node, manner, lengths))
    for name, manner in MANNERS.items():
        runs[name] = shown(name, circulated(node, manner, lengths))
    rate = {name: run["tokens_per_second"] for name, run in runs.items()}
    return {
        "mean_tokens": [float(lengths.prompt_tokens.mean()), float(lengths.output_tokens.mean())],
        "device_tokens": node.tiers.device_blocks * BLOCK_TOKENS,
        "runs": runs,
        "pipemax over td-pipe, its code": rate["pipemax"] / rate["temporal-published"],
        "pipemax over td-pipe, best": rate["pipemax"] / max(rate[name] for name in PUBLISHED),
        "pipemax over best static": rate["pipemax"] / max(rate[f"static {share}"] for share in STATIC_SHARES),
        "pipemax over temporal": rate["pipemax"] / rate["temporal"],
        "ours over pipemax": rate["ours"] / rate["pipemax"],
        "ours over temporal": rate["ours"] / rate["temporal"],
    }


def contended(data: Path, machine: str, workload: Workload, num_requests: int, seed: int) -> dict[str, object]:
    """A link that carries less than the scheduler believes, with budgets corrected and not."""
    node, lengths = Node.of(machine), lengths_of(data, workload).draw(num_requests, seed)
    found: dict[str, object] = {}
    for share in (1.0, 0.75, 0.5):
        for name, manner in (("pipemax", PIPEMAX), ("ours", OURS)):
            for corrected in (False, True):
                label = f"{name}, {'corrected' if corrected else 'believed'}, link at {share}"
                found[label] = shown(label, circulated(node, replace(manner, corrected=corrected), lengths, share))
    return found


def shown(name: str, run: dict[str, float]) -> dict[str, float]:
    print(name, json.dumps(run), file=sys.stderr, flush=True)
    return run


def select_seconds(num_candidates: int) -> float:
    """Real seconds of one decision over so many sequences, the mean of 200."""
    random = np.random.default_rng(0)
    context = random.integers(4, 4000, num_candidates)
    candidates = Candidates(context, -(-context // BLOCK_TOKENS), random.integers(0, 600, num_candidates))
    aim = Aim(Node.of(MACHINES[0]).time, 1000, MAX_SEQUENCES, 40, 20_000, 0, 12.5e-3, 512)
    return timeit(lambda: select(candidates, aim), number=200) / 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with traces/")
    parser.add_argument("--machines", nargs="+", default=MACHINES)
    parser.add_argument("--workloads", nargs="+", choices=sorted(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--requests", type=int, help="for all workloads; else as many as each has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--contended", action="store_true", help="budgets corrected or not, on links with less to give")
    args = parser.parse_args()
    found: dict[str, object] = {"published pipemax over td-pipe, up to": 1.42}
    for name, share in OCCUPANCIES.items():
        SCHEDULES[name] = type(name, (AtOccupancy,), {"refill_below": share})
    for machine in args.machines:
        for name in args.workloads:
            workload = WORKLOADS[name]
            run = contended if args.contended else compare
            num_requests = args.requests or workload.num_requests
            found[f"{machine} {name}"] = run(args.data, machine, workload, num_requests, args.seed)
    found["watermark a stage, links alike"] = {name: watermark_gain(name, 1.0) for name in args.machines}
    found["watermark a stage, one link at half"] = {name: watermark_gain(name, 0.5) for name in args.machines}
    found["select_seconds_of_1000"] = select_seconds(1000)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
