from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from batchpipe.report.trace import StepTrace
from batchpipe.runner.engine import Engine
from batchpipe.write.place import open_place
from tests.scheduler.scheduler_cases import EOS, capacity, fake, request


def run_traced(folder: Path, num_replicas: int = 2) -> Engine:
    (folder / "_batchpipe").mkdir(parents=True, exist_ok=True)
    offered = replace(capacity(), num_stages=2, max_batches=2)
    with StepTrace(open_place(str(folder)), num_replicas, 2) as trace:
        pipelines = [fake(offered) for _ in range(num_replicas)]
        engine = Engine(pipelines, "hybrid", frozenset({EOS}), lambda params: None, trace=trace)
        engine.add([request(index, 5 + index, max_tokens=6) for index in range(20)])
        while not engine.idle:
            engine.advance()
    return engine


def events(folder: Path, name: str = "_trace-00000.json") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / name).read_text())["traceEvents"]
    return found


def test_every_step_has_its_row_and_its_slices(tmp_path: Path) -> None:
    engine = run_traced(tmp_path)
    rows = pq.read_table(tmp_path / "_steps-00000.parquet").to_pylist()
    num_steps = sum(replica.scheduler.num_steps for replica in engine.replicas)
    assert len(rows) == num_steps
    assert {row["replica"] for row in rows} == {0, 1}
    assert sum(row["sampled"] for row in rows) == engine.meter.output_tokens
    assert sum(row["prompt_tokens"] + row["decodes"] for row in rows) >= engine.meter.prompt_tokens
    assert all(row["submitted_seconds"] <= row["ended_seconds"] for row in rows)
    slices = [event for event in events(tmp_path) if event["ph"] == "X"]
    assert len(slices) == 2 * num_steps
    assert {event["name"] for event in slices} <= {"prefill", "mixed", "decode"}
    for replica in (0, 1):
        for stage in (0, 1):
            own = [one for one in slices if (one["pid"], one["tid"]) == (replica, stage)]
            ends = [one["ts"] + one["dur"] for one in own]
            assert all(end <= later["ts"] + 0.2 for end, later in zip(ends, own[1:], strict=False))
    counters = [event for event in events(tmp_path) if event["ph"] == "C"]
    assert {event["name"] for event in counters} == {"sequences", "KV blocks"} and len(counters) == 2 * num_steps


def test_a_continued_job_has_files_of_each_run(tmp_path: Path) -> None:
    for _ in range(2):
        run_traced(tmp_path, num_replicas=1)
    names = {path.name for path in tmp_path.iterdir()} - {"_batchpipe"}
    assert names == {f"_{kind}" for i in range(2) for kind in (f"steps-0000{i}.parquet", f"trace-0000{i}.json")}
    assert not list((tmp_path / "_batchpipe").iterdir())
