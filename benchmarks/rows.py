"""Rows per second through all but the model: read, render, tokenise, plan, detokenise, commit. The last line is JSON.

    python benchmarks/rows.py --rows 1000000 --format jsonl [--export csv] [--profile]

The pipeline is the fake one, which answers with one to a few tokens a row. Memory is the resident set, read each
second. An export is timed apart, and its memory is what it adds at most.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from batchpipe.commands.export import export_command
from batchpipe.pipeline.base import Pipeline
from batchpipe.pipeline.fake import FakePipeline
from batchpipe.placement.placement import Placement
from batchpipe.runner.start import run_job
from batchpipe.types import Capacity

SUBJECTS = ("gravity", "a prime number", "the tide", "an opcode", "yeast", "a sonnet", "inflation", "the ozone layer")


def prompt_of(index: int) -> str:
    return f"Explain {SUBJECTS[index % len(SUBJECTS)]} to a child of {index % 17} in {index % 97} words."


def write_input(path: Path, num_rows: int) -> None:
    if path.suffix == ".jsonl":
        with path.open("w") as file:
            for index in range(num_rows):
                file.write(json.dumps({"id": f"row-{index}", "prompt": prompt_of(index)}) + "\n")
        return
    if path.suffix == ".openai-batch":
        with path.open("w") as file:
            for index in range(num_rows):
                body = {"model": "m", "messages": [{"role": "user", "content": prompt_of(index)}], "max_tokens": 4}
                head = {"custom_id": f"row-{index}", "method": "POST", "url": "/v1/chat/completions"}
                file.write(json.dumps({**head, "body": body}) + "\n")
        return
    schema = pa.schema([("id", pa.string()), ("prompt", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num_rows, 100_000):
            indexes = range(start, min(num_rows, start + 100_000))
            columns = {"id": [f"row-{i}" for i in indexes], "prompt": [prompt_of(i) for i in indexes]}
            writer.write_table(pa.table(columns, schema))


def open_fake(placement: Placement) -> list[Pipeline]:
    capacity = Capacity(
        num_blocks=4096,
        block_tokens=64,
        num_stages=1,
        max_batches=1,
        max_step_tokens=16384,
        max_batch_sequences=256,
    )
    info = placement.info
    return [FakePipeline(capacity, info.vocabulary_size, info.eos_token_ids[0], eos_every=2)]


class Memory(threading.Thread):
    """Samples (rows done, resident bytes) each second while a run goes on."""

    def __init__(self, output: Path) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, int]] = []
        self.ended = threading.Event()

    def run(self) -> None:
        process, started = psutil.Process(), time.monotonic()
        while not self.ended.wait(1.0):
            self.samples.append((time.monotonic() - started, process.memory_info().rss))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--format", choices=("jsonl", "parquet", "openai-batch"), default="jsonl")
    parser.add_argument(
        "--export", choices=("openai-batch", "jsonl", "csv"), help="time an export of the output as well"
    )
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--part-rows", type=int, default=50_000)
    parser.add_argument("--profile", action="store_true", help="print where the main thread's time goes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows.{args.format}"
        write_input(path, args.rows)
        job = {
            "model": {"name": args.model},
            "input": {"path": str(path), "format": args.format},
            "sampling": {"max_tokens": 4},
            "output": {"path": f"{folder}/output", "columns": "none", "part_rows": args.part_rows},
        }
        memory = Memory(Path(folder))
        memory.start()
        profiler = cProfile.Profile()
        if args.profile:
            profiler.enable()
        result = run_job(job, open_pipelines=open_fake)
        profiler.disable()
        exported: dict[str, float] = {}
        if args.export:
            ran_samples, started = len(memory.samples), time.monotonic()
            before = psutil.Process().memory_info().rss
            export_command(result.path, args.export)
            exported["export_seconds"] = time.monotonic() - started
            peak = max((rss for _, rss in memory.samples[ran_samples:]), default=before)
            exported["export_adds_gigabytes"] = (peak - before) / 1e9
        memory.ended.set()
        if args.profile:
            pstats.Stats(profiler).sort_stats("tottime").print_stats(30)
        seconds = result.metrics["generate_seconds"]
        tenth = [rss for at, rss in memory.samples if at <= 0.15 * memory.samples[-1][0]]
        print(
            json.dumps(
                {
                    "rows": result.metrics["rows_total"],
                    "rows_per_second": result.metrics["rows_total"] / seconds,
                    "seconds": seconds,
                    "planner_seconds": result.metrics["planner_seconds"],
                    "resident_gigabytes_after_first_tenth": max(tenth, default=0) / 1e9,
                    "resident_gigabytes_peak": max(rss for _, rss in memory.samples) / 1e9,
                    **exported,
                }
            )
        )


if __name__ == "__main__":
    main()
