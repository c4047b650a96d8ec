"""Adaptive expansion against fixed shares: how many blocks pass through the device beside each step, on one stage.

    python benchmarks/expansion.py DATA_FOLDER PROFILE.yaml --gigabytes-per-second 5 0.5

Simulated from a profile (`batchpipe profile`), with `offload: layer`, ShareGPT's lengths and a share of the KV that the
rows need at their peak on the device. A sweep gives every step the same number of blocks; the run of the budget that
measures and corrects itself is compared with the best of them, and with one tier. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean
from unittest.mock import patch

from batchpipe.cost.model import CostModel
from batchpipe.cost.profile import load_profile
from batchpipe.cost.profile_cost import ProfileCost
from batchpipe.pipeline.simulated import SimulatedPipeline
from batchpipe.runner.simulate import simulate
from batchpipe.scheduler.offload.prefetch_budget import PrefetchBudget
from batchpipe.types import Capacity
from benchmarks.replay_cases import EOS_TOKEN_ID, Lengths, ReplayPredictor, read_lengths, requests_of

BLOCK_TOKENS = 64
MAX_STEP_TOKENS = 512
MAX_SEQUENCES = 256
SEED = 0


def fixed(num_blocks: int) -> type[PrefetchBudget]:
    class Fixed(PrefetchBudget):
        def blocks(self, step_seconds: float | None = None) -> int:
            return num_blocks

    return Fixed


class Case:
    """One stage with a link of so many bytes per second each way."""

    def __init__(self, args: argparse.Namespace, bytes_per_second: float) -> None:
        profile = load_profile(args.profile)
        rates = ("host_to_device_bytes_per_second", "device_to_host_bytes_per_second")
        link = profile.link.model_copy(update=dict.fromkeys(rates, bytes_per_second))
        self._num_layers = profile.model.num_layers
        self._cost: CostModel = ProfileCost(profile.model_copy(update={"link": link}), [range(self._num_layers)])
        population = read_lengths(args.data, "sharegpt")
        drawn = population.draw(args.rows, SEED)
        self._lengths = Lengths(
            drawn.prompt_tokens, drawn.output_tokens.clip(max=args.max_tokens), drawn.context_tokens
        )
        self._predictor = ReplayPredictor(args.data, population, self._lengths, SEED)

    def run(self, num_blocks: int, *, offload: str, budget: type[PrefetchBudget] = PrefetchBudget) -> dict[str, float]:
        requests, by_stream = requests_of(self._lengths)
        needed_blocks = MAX_SEQUENCES * self._lengths.context_tokens // BLOCK_TOKENS
        capacity = Capacity(
            num_blocks=num_blocks or needed_blocks,
            block_tokens=BLOCK_TOKENS,
            num_stages=1,
            max_batches=1 + (offload == "batch"),
            max_step_tokens=MAX_STEP_TOKENS,
            max_batch_sequences=MAX_SEQUENCES,
            num_host_blocks=0 if offload == "none" else needed_blocks,
            streams_per_block=self._num_layers // 2,
            offload=offload,
        )
        pipeline = SimulatedPipeline(capacity, self._cost, by_stream, EOS_TOKEN_ID)
        with patch("batchpipe.scheduler.offload.swap_scheduler.PrefetchBudget", budget):
            run = simulate([pipeline], requests, "temporal", predictor=self._predictor)
        assert run.num_failed == 0
        return {
            "output_tokens_per_second": run.output_tokens_per_second,
            "peak_blocks": run.peak_used_blocks,
            "mean_batch": mean(step.num_sequences for step in pipeline.steps),
            "stall_share": run.stage_stall_shares[0],
            "link_share": run.loaded_bytes / run.seconds / self._cost.kv_links[0].load_bytes_per_second,
            "recomputed_tokens": run.num_recomputed_tokens,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--share", type=float, default=0.25, help="of the KV needed at the peak")
    parser.add_argument("--gigabytes-per-second", type=float, nargs="+", default=[5.0, 0.5])
    parser.add_argument("--fixed-blocks", type=int, nargs="+", default=[4, 16, 64, 128, 256, 512, 1024, 2048])
    args = parser.parse_args()
    results = []
    for rate in args.gigabytes_per_second:
        case = Case(args, rate * 1e9)
        resident = case.run(0, offload="none")
        num_blocks = int(args.share * resident["peak_blocks"])
        runs = {"resident": resident, "none": case.run(num_blocks, offload="none")}
        runs["adaptive"] = case.run(num_blocks, offload="layer")
        for blocks in args.fixed_blocks:
            runs[f"fixed {blocks}"] = case.run(num_blocks, offload="layer", budget=fixed(blocks))
        for name, figures in runs.items():
            print(rate, name, json.dumps(figures), file=sys.stderr, flush=True)
        rates = {name: figures["output_tokens_per_second"] for name, figures in runs.items()}
        best = max((name for name in runs if name.startswith("fixed")), key=lambda name: rates[name])
        results.append(
            {
                "gigabytes_per_second": rate,
                "device_blocks": num_blocks,
                "best_fixed": best,
                "adaptive_over_best_fixed": rates["adaptive"] / rates[best],
                "adaptive_over_resident": rates["adaptive"] / rates["resident"],
                "adaptive_over_none": rates["adaptive"] / rates["none"],
                "runs": runs,
            }
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
