"""One job under two settings, alternating: speed as a ratio, preemptions, and whether the texts are the same.

    python benchmarks/settings.py --prompts gsm8k_256.jsonl --pairs 3 \
        --set engine.kv_device_memory=600MiB --first plan.schedule=temporal --second plan.schedule=hybrid

The last line is JSON; `ratio` is the first setting's output tokens per second over the second's, the median of pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

ROOT = Path(__file__).parent.parent
KEYS = (
    *("output_tokens_per_second", "completion_tokens", "preemptions", "recomputed_tokens", "phase_switches"),
    *("peak_device_blocks", "planner_seconds", "generate_seconds", "stage_utilization"),
)


def run(job: dict[str, Any], overrides: list[str], folder: Path) -> tuple[dict[str, Any], list[str]]:
    path = folder / "job.yaml"
    path.write_text(json.dumps(job | {"output": {"path": str(folder / "output"), "columns": "none"}}))
    parts = [part for override in overrides for part in ("--set", override)]
    command = [sys.executable, "-m", "batchpipe", "run", str(path), "--fresh", *parts]
    done = subprocess.run(command, stdout=subprocess.DEVNULL)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}")
    figures = pq.read_table(folder / "output" / "_metrics.parquet").to_pylist()[-1]
    table = pq.read_table(folder / "output" / "completions").sort_by([("row_index", "ascending")])
    return {key: figures[key] for key in KEYS}, table["completion"].to_pylist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", default=str(ROOT / "jobs" / "quickstart.jsonl"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], help="an override of both settings")
    parser.add_argument("--first", action="append", default=[], help="an override of the first setting")
    parser.add_argument("--second", action="append", default=[], help="an override of the second setting")
    args = parser.parse_args()
    job = {
        "model": {"name": args.model, "dtype": args.dtype},
        "input": {"path": str(Path(args.prompts).absolute()), "limit": args.rows},
        "sampling": {"max_tokens": args.max_tokens},
    }
    runs: dict[str, list[dict[str, Any]]] = {"first": [], "second": []}
    num_equal = []
    for _ in range(args.pairs):
        texts = []
        for name, own in (("first", args.first), ("second", args.second)):
            with tempfile.TemporaryDirectory() as folder:
                figures, completions = run(job, args.set + own, Path(folder))
            runs[name].append(figures)
            texts.append(completions)
            print(name, json.dumps(figures), file=sys.stderr, flush=True)
        num_equal.append(sum(a == b for a, b in zip(*texts, strict=True)))
    ratios = [
        first["output_tokens_per_second"] / second["output_tokens_per_second"]
        for first, second in zip(runs["first"], runs["second"], strict=True)
    ]
    print(
        json.dumps(
            {"settings": vars(args), "ratio": statistics.median(ratios), "ratios": ratios, "equal_texts": num_equal}
            | runs
        )
    )


if __name__ == "__main__":
    main()
