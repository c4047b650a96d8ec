"""TD-Pipe's benchmark (arXiv 2506.10470, section 4) replayed on its own profiles. The last line is JSON.

    python benchmarks/tdpipe.py DATA_FOLDER --models 13b 32b
    python benchmarks/tdpipe.py DATA_FOLDER --ours --seeds 1 2 3

Four L20 cards without NVLink. A system is a way to use them and a schedule, as in `pipeline/temporal`:

- pipeline: a stage a card, one scheduler with a batch in flight for each;
- engines: a stage a card, but four schedulers with a quarter of the KV each and a batch in flight each, which is how
  vLLM 0.5.3, the paper's baseline, runs a pipeline (its "virtual engines");
- tensor: every layer on all cards, two all-reduces a layer.

Without --ours: every system on 5,000 ShareGPT-like requests, beside the published ratios. With --ours: `temporal`
over `temporal-published`, on several seeds and traces.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from time import perf_counter

from batchpipe.pipeline.simulated import SimulatedPipeline, SimulatedStages
from batchpipe.runner.simulate import simulate
from batchpipe.types import Capacity
from benchmarks.replay_cases import EOS_TOKEN_ID, L20, MODELS, CurveCost, ReplayPredictor, read_lengths, requests_of

SYSTEMS = (
    "engines/separate", "engines/hybrid", "tensor/separate", "tensor/hybrid", "pipeline/separate", "pipeline/hybrid",
    "pipeline/temporal-published", "pipeline/temporal",
)  # fmt: skip
# TD-Pipe over each, "up to", four cards.
PUBLISHED = {"engines/separate": 2.73, "engines/hybrid": 2.21, "tensor/separate": 1.91, "tensor/hybrid": 1.90}
TRACES = ("sharegpt", "azure2023_conv", "etalon_bwb")
# Requests of a trace: one or two million completion tokens each.
NUM_REQUESTS = {"sharegpt": 5000, "etalon_sharegpt8k": 3000, "azure2023_conv": 5000, "etalon_bwb": 500}
NUM_CARDS = 4
# vLLM 0.5.3 cuts prompts to fill steps of 512 tokens; whole prompts go up to the end of the profile.
MAX_STEP_TOKENS = {"hybrid": 512}
WHOLE_PROMPTS_TOKENS = 2048
BLOCK_TOKENS = 16
MAX_SEQUENCES = 256
# TD-Pipe's driver submits the prefills of a phase without waiting for their results.
PREFILLS_AHEAD = 64
# Between a step's last stage and the next step of the same sequences, where nothing hides it.
CONTROL_SECONDS = 3e-3


def replay(data: Path, model: str, system: str, trace: str, num_requests: int, seed: int) -> dict[str, float]:
    """One run of one system; requests and predictions depend on the trace and the seed alone."""
    cut, schedule = system.split("/")
    profiled = MODELS[model]
    tensor_parallel = cut == "tensor"
    cost = CurveCost(
        data, profiled, L20, num_cards=NUM_CARDS, tensor_parallel=tensor_parallel, control_seconds=CONTROL_SECONDS
    )
    num_engines = NUM_CARDS if cut == "engines" else 1
    population = read_lengths(data, trace)
    lengths = population.draw(num_requests, seed)
    predictor = ReplayPredictor(data, population, lengths, seed)
    requests, by_stream = requests_of(lengths)
    capacity = Capacity(
        num_blocks=profiled.num_blocks // num_engines,
        block_tokens=BLOCK_TOKENS,
        num_stages=cost.num_stages,
        max_batches=cost.num_stages // num_engines,
        max_step_tokens=MAX_STEP_TOKENS.get(schedule, WHOLE_PROMPTS_TOKENS),
        max_batch_sequences=MAX_SEQUENCES,
        max_prefills_ahead=PREFILLS_AHEAD if cut == "pipeline" else 0,
    )
    started = perf_counter()
    stages = SimulatedStages(cost.num_stages)
    pipelines = [SimulatedPipeline(capacity, cost, by_stream, EOS_TOKEN_ID, stages=stages) for _ in range(num_engines)]
    run = simulate(pipelines, requests, schedule, predictor=predictor)
    assert run.num_failed == 0
    assert run.output_tokens == lengths.output_tokens.sum(), "a request did not end at its length"
    figures = {
        "seconds": run.seconds,
        "output_tokens_per_second": run.output_tokens_per_second,
        "utilization": statistics.mean(run.stage_utilization),
        "num_steps": run.num_steps,
        "num_phase_switches": run.num_phase_switches,
        "num_preemptions": run.num_preemptions,
        "num_recomputed_tokens": run.num_recomputed_tokens,
        "peak_kv_share": run.peak_used_blocks / capacity.num_blocks,
        "predictor_accuracy": predictor.accuracy,
        "planner_seconds": run.planner_seconds,
        "real_seconds": perf_counter() - started,
    }
    print(model, trace, seed, system, json.dumps(figures), file=sys.stderr)
    return figures


def table(args: argparse.Namespace) -> dict[str, object]:
    """By model and trace: every system's figures, and how much faster the temporal ones are than each other one."""
    found: dict[str, object] = {"published_over": PUBLISHED}
    for model in args.models:
        for trace in args.traces or TRACES[:1]:
            num_requests = args.requests or NUM_REQUESTS[trace]
            runs = {name: replay(args.data, model, name, trace, num_requests, args.seeds[0]) for name in args.systems}
            rate = {name: run["output_tokens_per_second"] for name, run in runs.items()}
            temporal = [name for name in runs if "temporal" in name]
            ratios = {name: {other: rate[name] / rate[other] for other in runs if other != name} for name in temporal}
            found[f"{model} {trace}"] = {"runs": runs, "over": ratios}
    return found


def ours(args: argparse.Namespace) -> dict[str, object]:
    """By model and trace: ours over the published schedule, a ratio a seed."""
    found: dict[str, object] = {}
    for model in args.models:
        for trace in args.traces or TRACES:
            num_requests = args.requests or NUM_REQUESTS[trace]
            ratios = []
            for seed in args.seeds:
                rates = [
                    replay(args.data, model, f"pipeline/{schedule}", trace, num_requests, seed)
                    for schedule in ("temporal", "temporal-published")
                ]
                ratios.append(rates[0]["output_tokens_per_second"] / rates[1]["output_tokens_per_second"])
            found[f"{model} {trace}"] = {"ratios": ratios, "median": statistics.median(ratios)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with profiles/, prompts/ and traces/")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    parser.add_argument(
        "--systems", nargs="+", default=SYSTEMS, help="pipeline, engines or tensor, a slash, a schedule"
    )
    parser.add_argument(
        "--traces", nargs="+", choices=sorted(NUM_REQUESTS), help="default: ShareGPT; with --ours three"
    )
    parser.add_argument("--requests", type=int, help="for all traces; else as many as come to some million tokens")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--ours", action="store_true", help="temporal over temporal-published")
    args = parser.parse_args()
    print(json.dumps(ours(args) if args.ours else table(args)))


if __name__ == "__main__":
    main()
