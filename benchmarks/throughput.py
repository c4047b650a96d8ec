"""Output tokens per second of `batchpipe run` on a prompts file, alternating with a peer; the last line is JSON.

    python benchmarks/throughput.py --prompts gsm8k_256.jsonl --pairs 3 \
        --peer "peer/bin/python peer_vllm.py --model MODEL_DIR --prompts gsm8k_256.jsonl --max-tokens 256"

A peer is any command whose last line is a JSON object with `output_tokens_per_second`. Every run is a process of its
own; wall seconds are counted from the command to its end, for both. Without --prompts the quickstart's rows are taken.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def timed(command: list[str]) -> dict[str, float]:
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    wall_seconds = time.perf_counter() - started
    if done.returncode not in (0, 3):
        sys.exit(f"{shlex.join(command)} ended with {done.returncode}")
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures | {"command_seconds": wall_seconds}


def own_command(args: argparse.Namespace, folder: Path) -> list[str]:
    job = {
        "model": {"name": args.model, "dtype": args.dtype},
        "input": {"path": str(Path(args.prompts).absolute()), "limit": args.rows},
        "sampling": {"max_tokens": args.max_tokens},
        "engine": {"num_stages": args.num_stages},
        "output": {"path": str(folder / "output"), "columns": "none"},
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(job))
    overrides = [part for override in args.set for part in ("--set", override)]
    return [sys.executable, "-m", "batchpipe", "run", str(path), "--fresh", *overrides]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", default=str(ROOT / "jobs" / "quickstart.jsonl"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--num-stages", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], help="a further override of the job, as in batchpipe run")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--peer", help="command to alternate with")
    args = parser.parse_args()
    own, peer = [], []
    for _ in range(args.pairs):
        with tempfile.TemporaryDirectory() as folder:
            own.append(timed(own_command(args, Path(folder))))
        print("batchpipe", json.dumps(own[-1]), file=sys.stderr)
        if args.peer:
            peer.append(timed(shlex.split(args.peer)))
            print("peer     ", json.dumps(peer[-1]), file=sys.stderr)
    summary: dict[str, float | list[float]] = {
        "output_tokens_per_second": statistics.median(run["output_tokens_per_second"] for run in own),
        "command_seconds": statistics.median(run["command_seconds"] for run in own),
    }
    if peer:
        for key in ("output_tokens_per_second", "command_seconds"):
            summary[f"peer_{key}"] = statistics.median(run[key] for run in peer)
            ratios = [a[key] / b[key] for a, b in zip(own, peer, strict=True)]
            summary[f"{key}_ratios"] = ratios
            summary[f"{key}_ratio"] = statistics.median(ratios)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
