"""Whole jobs on the device: their speed, what becomes of KV that does not fit, and what is said where nothing fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import batchpipe
from benchmarks.gpu.case import Case

_FIGURES = (
    "rows_succeeded",
    "rows_failed",
    "prompt_tokens",
    "completion_tokens",
    "output_tokens_per_second",
    "load_seconds",
    "generate_seconds",
    "stage_utilization",
    "preemptions",
    "recomputed_tokens",
    "host_to_device_bytes",
    "device_to_host_bytes",
    "stall_seconds",
    "kv_faults",
    "planner_seconds",
)


def job_of(
    case: Case, folder: Path, rows: Path, sampling: Mapping[str, Any], engine: Mapping[str, Any], dtype: str
) -> dict[str, Any]:
    return {
        "model": {"name": str(folder), "dtype": dtype},
        "input": {"path": str(rows), "chat_template": "none"},
        "sampling": dict(sampling),
        "engine": dict(engine),
        "output": {"path": str(case.work / "output"), "columns": "none"},
    }


def run_here(
    case: Case,
    folder: Path,
    rows: Path,
    sampling: Mapping[str, Any],
    engine: Mapping[str, Any],
    *,
    dtype: str = "bfloat16",
) -> tuple[list[str], Mapping[str, Any]]:
    """A job in this process: the texts in the order of the input, and the run's metrics."""
    result = batchpipe.run(job_of(case, folder, rows, sampling, engine, dtype), fresh=True)
    return result.table()["completion"].to_pylist(), result.metrics


def job(case: Case) -> None:
    """Jobs from rows to Parquet with the case's shape: greedy, sampled, and with a part of the KV on the device."""
    folder = case.saved_model()
    rows = case.rows(*((8, 60) if case.tiny else (256, 1000)))
    sampling = {"max_tokens": 8 if case.tiny else 96, "ignore_eos": True}
    step_tokens = 512 if case.tiny else 4096
    short = {"kv_device_memory": "64KiB" if case.tiny else "1GiB", "max_step_tokens": step_tokens}
    host = {**short, "kv_host_memory": "1MiB" if case.tiny else "8GiB"}
    settings: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "greedy": ({}, {}),
        "temperature 1, top_p 0.95": ({"temperature": 1.0, "top_p": 0.95}, {}),
        "short of KV": ({}, short),
        "short of KV, swapped by layer": ({}, {**host, "offload": "layer"}),
        "short of KV, swapped by layer, one in 32 blocks verified": (
            {},
            {**host, "offload": "layer", "kv_verify": "sample"},
        ),
    }
    if case.holds_two_stages:
        settings["two stages"] = ({}, {"num_stages": 2})
        settings["two stages, short of KV, prefetched by batch"] = ({}, {**host, "num_stages": 2, "offload": "batch"})
    for name, (more, engine) in settings.items():

        def run(more: dict[str, Any] = more, engine: dict[str, Any] = engine) -> dict[str, Any]:
            _, metrics = run_here(case, folder, rows, sampling | more, engine | {"device": case.device})
            return {key: metrics[key] for key in _FIGURES} | {"wrong": metrics["kv_faults"] > 0}

        case.attempt(name, run)


def errors(case: Case) -> None:
    """The exit codes of jobs that cannot run, and what the command says."""
    folder, rows = case.saved_model(), case.rows(8, 60)
    cases: list[tuple[str, int, dict[str, Any], dict[str, str]]] = [
        ("kv_device_memory of 900 GiB", 7, {"kv_device_memory": "900GiB"}, {}),
        (
            "kv_host_memory of 9000 GiB",
            7,
            {"kv_device_memory": "1MiB" if case.tiny else "1GiB", "kv_host_memory": "9000GiB"},
            {},
        ),
        ("device: cuda where no GPU is seen", 2, {"device": "cuda"}, {"CUDA_VISIBLE_DEVICES": ""}),
    ]
    if case.device == "cuda":
        cases.append(("more stages than GPUs", 2, {"num_stages": 16}, {}))
    path = case.work / "job.json"
    for what, wanted, engine, environment in cases:
        sampling = {"max_tokens": 4}
        path.write_text(json.dumps(job_of(case, folder, rows, sampling, {"device": case.device} | engine, "bfloat16")))
        command = [sys.executable, "-m", "batchpipe", "run", str(path), "--fresh"]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
        said = done.stderr.strip().splitlines()
        case.say(what, wrong=done.returncode != wanted, exit_code=done.returncode, wanted=wanted, said=said[-1:])
