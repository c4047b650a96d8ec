"""What `batchpipe plan` says a job takes, against the run itself: three jobs of different kinds. The last line is JSON.

    python benchmarks/plan_error.py DATA_FOLDER --model MODEL_DIR [--jobs gsm8k sharegpt mmlu]

A plan needs the machine's profile (`batchpipe profile`) and some idea of this model's lengths: a predictor is trained
on the answers to other rows of the same kind. DATA_FOLDER holds the prompts of openai/grade-school-math (gsm8k_train,
gsm8k_test), ShareGPT V3 first turns with splits (sharegpt_prompts) and hendrycks/test (mmlu_57subjects), as .jsonl.xz.
"""

from __future__ import annotations

import argparse
import json
import lzma
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

PILOT_ROWS = 128


def lines(path: Path) -> Iterator[dict[str, Any]]:
    with lzma.open(path, "rt") as file:
        for line in file:
            yield json.loads(line)


def gsm8k(data: Path) -> tuple[list[str], list[str], int]:
    """Prompts of the job, prompts of the pilot, max_tokens."""
    job = [row["prompt"] for row in islice(lines(data / "gsm8k_test.jsonl.xz"), 512)]
    return job, [row["prompt"] for row in islice(lines(data / "gsm8k_train.jsonl.xz"), PILOT_ROWS)], 256


def sharegpt(data: Path) -> tuple[list[str], list[str], int]:
    rows = list(lines(data / "sharegpt_prompts.jsonl.xz"))
    job = [row["prompt"] for row in rows if row["split"] == "bench"][:256]
    return job, [row["prompt"] for row in rows if row["split"] == "train"][:PILOT_ROWS], 512


def mmlu(data: Path) -> tuple[list[str], list[str], int]:
    """Nine questions of each subject, the subject's five shots before each; one token needs no pilot."""
    prompts = []
    for subject in lines(data / "mmlu_57subjects.jsonl.xz"):
        shots = "\n\n".join(_question(row, answered=True) for row in subject["dev"])
        prompts += [f"{shots}\n\n{_question(row, answered=False)}" for row in subject["test"][:9]]
    return prompts[:512], [], 1


def _question(row: list[str], *, answered: bool) -> str:
    """A row is the question, four choices and the number of the right one."""
    choices = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row[1:5], strict=True))
    return f"{row[0]}\n{choices}\nAnswer:" + (f" {'ABCD'[int(row[5])]}" if answered else "")


JOBS = {"gsm8k": gsm8k, "sharegpt": sharegpt, "mmlu": mmlu}


def batchpipe(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "batchpipe", *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"batchpipe {' '.join(arguments)} ended with {done.returncode}")
    closing: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return closing


def write_job(folder: Path, name: str, prompts: list[str], model: str, max_tokens: int) -> str:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    job = {
        "model": {"name": model, "dtype": "bfloat16"},
        "input": {"path": str(folder / f"{name}.jsonl"), "id_column": None},
        "sampling": {"max_tokens": max_tokens},
        "output": {"path": str(folder / name)},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(job))
    return str(path)


def compare(kind: str, data: Path, model: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts, pilot, max_tokens = JOBS[kind](data)
        job = write_job(folder, "job", prompts, model, max_tokens)
        override = []
        if pilot:
            batchpipe("run", write_job(folder, "pilot", pilot, model, max_tokens))
            predictor = str(folder / "predictor.safetensors")
            batchpipe("predictor", "train", str(folder / "pilot"), "--model", model, "--output", predictor)
            override = ["--set", f"predict.method={predictor}"]
        plan = batchpipe("plan", job, *override)
        batchpipe("run", job, *override)
        metrics = pq.read_table(folder / "job" / "_metrics.parquet").to_pylist()[-1]
    real = metrics["generate_seconds"]
    return {
        "job": kind,
        "rows": len(prompts),
        "planned_seconds": plan["generate_seconds"],
        "real_seconds": real,
        "error": plan["generate_seconds"] / real - 1,
        "planned_completion_tokens": plan["completion_tokens"],
        "real_completion_tokens": metrics["completion_tokens"],
        "planner_fraction": metrics["planner_seconds"] / real,
        "times_from": plan["times_from"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--jobs", nargs="+", choices=sorted(JOBS), default=list(JOBS))
    args = parser.parse_args()
    results = []
    for kind in args.jobs:
        results.append(compare(kind, args.data, args.model))
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
