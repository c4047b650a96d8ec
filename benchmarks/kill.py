"""Kills a real run with SIGKILL at random instants, resumes it each time, and compares with an uninterrupted one.

    python benchmarks/kill.py --prompts gsm8k_256.jsonl --rows 256 --kills 20

Every start of the command is killed after a random time until so many kills were done; a job that ends before is
checked and begun anew. Each job must hold every row once, its texts byte for byte those of the uninterrupted run, in
float32.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parent.parent


def completions(output: Path) -> pa.Table:
    table = pq.read_table(output / "completions")
    order = [("row_index", "ascending"), ("sample_index", "ascending")]
    return table.select(["row_index", "sample_index", "row_id", "completion", "finish_reason"]).sort_by(order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", default=str(ROOT / "jobs" / "quickstart.jsonl"))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-stages", type=int, default=1)
    args = parser.parse_args()
    instants = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = {
            "model": {"name": args.model, "dtype": "float32"},
            "input": {"path": str(Path(args.prompts).absolute()), "limit": args.rows},
            "sampling": {"max_tokens": args.max_tokens},
            "engine": {"num_stages": args.num_stages},
            "output": {"path": str(folder / "killed"), "columns": "none", "part_rows": 50},
        }
        (folder / "job.yaml").write_text(json.dumps(job))
        command = [sys.executable, "-m", "batchpipe", "run", str(folder / "job.yaml")]
        started = time.perf_counter()
        subprocess.run([*command, "--set", f"output.path={folder / 'whole'}"], check=True, stdout=subprocess.DEVNULL)
        whole_seconds = time.perf_counter() - started
        whole = completions(folder / "whole")
        num_kills = num_jobs = 0
        after_seconds: list[float] = []
        while num_kills < args.kills or num_jobs == 0:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                limit = instants.uniform(0, whole_seconds) if num_kills < args.kills else None
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                num_kills += 1
                after_seconds.append(round(limit or 0.0, 2))
                continue
            assert code == 0, f"the run ended with {code}"
            assert completions(folder / "killed") == whole, "rows differ from the uninterrupted run's"
            num_jobs += 1
            shutil.rmtree(folder / "killed")
        if (folder / "killed").exists():
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            assert completions(folder / "killed") == whole, "rows differ from the uninterrupted run's"
            num_jobs += 1
        print(
            json.dumps(
                {
                    "rows": whole.num_rows,
                    "kills": num_kills,
                    "kill_seconds": after_seconds,
                    "jobs_completed_and_equal": num_jobs,
                    "uninterrupted_seconds": round(whole_seconds, 1),
                }
            )
        )


if __name__ == "__main__":
    main()
