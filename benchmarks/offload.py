"""One job with all KV on the device, and with a share of that: by recomputing, and by each way of offloading.

    python benchmarks/offload.py --prompts gsm8k_512.jsonl --share 0.25 --ways none layer --gigabytes-per-second 6 0.6

On the CPU the link between the tiers is emulated: every byte is copied, and arrives no sooner than the link would let
it. `--gigabytes-per-second` is of one direction, each a link of its own. Copies take a core that a GPU's copy engine
would not take from computing: leave them one (OMP_NUM_THREADS). Rounds alternate between the ways; ratios are medians
over rounds. Of those without a second tier `none` plans by predicted lengths, so that nothing has to be given up, and
`recompute` admits all there is room for and computes again what it has to give up. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import batchpipe
from batchpipe.pipeline.swap.copy_engine import EmulatedLink
from batchpipe.placement.offload_mode import OffloadChoice
from batchpipe.placement.open import open_pipelines
from batchpipe.runner.start import run_job

ROOT = Path(__file__).parent.parent
ONE_TIER = ("none", "recompute")
KEYS = (
    *("output_tokens_per_second", "generate_seconds", "completion_tokens", "preemptions", "recomputed_tokens"),
    *("peak_device_blocks", "peak_host_blocks", "host_to_device_bytes", "device_to_host_bytes", "stall_seconds"),
    *("planner_seconds", "stage_utilization", "reused_tokens", "kv_faults"),
)


def run_one(settings: dict[str, Any]) -> None:
    """In a process of its own: prints the run's figures and a digest of every text."""
    rate = settings["bytes_per_second"]
    link = None if rate is None else EmulatedLink(rate, rate)
    with tempfile.TemporaryDirectory() as folder:
        job = settings["job"] | {"output": {"path": f"{folder}/output", "columns": "none"}}
        # What the command decides for itself is given here, so that every way can be measured.
        offload = OffloadChoice(settings["offload"], "given")
        run_job(job, open_pipelines=lambda placed: open_pipelines(replace(placed, offload=offload), link=link))
        figures = pq.read_table(f"{folder}/output/_metrics.parquet").to_pylist()[-1]
        table = pq.read_table(f"{folder}/output/completions").sort_by([("row_index", "ascending")])
    print(json.dumps({key: figures[key] for key in KEYS} | {"texts": table["completion"].to_pylist()}))


def measured(job: dict[str, Any], offload: str, bytes_per_second: float | None) -> dict[str, Any]:
    settings = json.dumps({"job": job, "offload": offload, "bytes_per_second": bytes_per_second})
    done = subprocess.run([sys.executable, __file__, "--one", settings], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"offload {offload} ended with {done.returncode}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def job_of(args: argparse.Namespace, engine: dict[str, Any]) -> dict[str, Any]:
    own: dict[str, Any] = {}
    for override in args.set:
        section, _, rest = override.partition(".")
        key, _, value = rest.partition("=")
        own.setdefault(section, {})[key] = json.loads(value) if value[:1] in "0123456789tfn[{" else value
    job: dict[str, Any] = {
        "model": {"name": args.model, "dtype": args.dtype},
        "input": {"path": str(Path(args.prompts).absolute()), "limit": args.rows},
        "sampling": {"max_tokens": args.max_tokens},
        "engine": {"num_stages": args.num_stages, "kv_verify": args.verify} | engine,
    }
    return {section: job.get(section, {}) | own.get(section, {}) for section in job | own}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--prompts", default=str(ROOT / "jobs" / "quickstart.jsonl"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--num-stages", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.25, help="of the KV that the job needs at its peak")
    parser.add_argument("--block-bytes", type=int, required="--one" not in sys.argv, help="of a KV block of one stage")
    parser.add_argument("--host-memory", default="8GiB")
    parser.add_argument("--ways", nargs="+", default=["none", "layer"])
    parser.add_argument(
        "--gigabytes-per-second", type=float, nargs="+", help="of the emulated link; as fast as it goes if left out"
    )
    parser.add_argument("--verify", default="off")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], help="a further override of the job, section.key=value")
    return parser.parse_args()


def main() -> None:
    args = parsed()
    if args.one:
        run_one(json.loads(args.one))
        return
    rates = args.gigabytes_per_second or [None]
    ways: dict[str, tuple[str, float | None]] = {}
    for way in args.ways:
        links = [None] if way in ONE_TIER else rates
        ways |= {way if rate is None else f"{way} at {rate:g} GB/s": (way, rate) for rate in links}
    runs: dict[str, list[dict[str, Any]]] = {"resident": [], **{name: [] for name in ways}}
    num_equal: dict[str, list[int]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        whole = measured(job_of(args, {}), "none", None)
        texts = whole.pop("texts")
        runs["resident"].append(whole)
        print("resident", json.dumps(whole), file=sys.stderr, flush=True)
        device_bytes = int(args.share * whole["peak_device_blocks"]) * args.block_bytes
        for name, (way, rate) in ways.items():
            host_memory = 0 if way in ONE_TIER else args.host_memory
            offload = "none" if way in ONE_TIER else way
            engine = {"kv_device_memory": device_bytes, "kv_host_memory": host_memory, "offload": offload}
            job = job_of(args, engine)
            if way == "recompute":
                job |= {"plan": {"schedule": "hybrid"}, "predict": {"method": "none"}}
            figures = measured(job, offload, None if rate is None else rate * 1e9)
            num_equal[name].append(sum(a == b for a, b in zip(texts, figures.pop("texts"), strict=True)))
            runs[name].append(figures)
            print(name, json.dumps(figures), file=sys.stderr, flush=True)

    def ratio(first: str, second: str) -> float:
        pairs = zip(runs[first], runs[second], strict=True)
        ratios: list[float] = [a["output_tokens_per_second"] / b["output_tokens_per_second"] for a, b in pairs]
        return statistics.median(ratios)

    summary = {
        "settings": vars(args),
        "version": batchpipe.__version__,
        "over_resident": {name: ratio(name, "resident") for name in ways},
        "over_one_tier": {way: {name: ratio(name, way) for name in ways} for way in ONE_TIER if way in args.ways},
        "equal_texts": num_equal,
        "num_rows": len(texts),
    }
    print(json.dumps(summary | runs))


if __name__ == "__main__":
    main()
