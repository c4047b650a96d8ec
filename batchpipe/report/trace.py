"""`run.trace`: every step of a run, as a table and as a trace for ui.perfetto.dev, written while the run goes on.

A stage's slices are laid back from the moment when the step's result came, by the time that each stage computed: that
is what the controller knows, and it is exact but for hand-offs and queueing.
"""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import IO, Any, Protocol, Self

import pyarrow as pa
import pyarrow.parquet as pq

from batchpipe.types import Step, StepResult
from batchpipe.write.durable import sync
from batchpipe.write.place import Place

STEPS_SCHEMA = pa.schema(
    [
        ("replica", pa.int32()),
        ("step", pa.int64()),
        ("submitted_seconds", pa.float64()),  # since the run's first step
        ("ended_seconds", pa.float64()),
        ("decodes", pa.int32()),
        ("prompts", pa.int32()),
        ("prompt_tokens", pa.int32()),
        ("context_tokens", pa.int64()),
        ("sampled", pa.int32()),
        ("running", pa.int32()),
        ("device_blocks", pa.int64()),
        ("host_blocks", pa.int64()),
        ("stage_seconds", pa.list_(pa.float64())),
        ("stall_seconds", pa.float64()),
        ("loaded_bytes", pa.int64()),
        ("stored_bytes", pa.int64()),
    ]
)
_BATCH_ROWS = 2048


class Occupancy(Protocol):
    """What a scheduler tells of its replica."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_device_blocks(self) -> int: ...
    @property
    def num_host_blocks(self) -> int: ...


@dataclass(frozen=True, slots=True)
class _Submitted:
    seconds: float
    decodes: int
    prompts: int
    prompt_tokens: int
    context_tokens: int


class StepTrace:
    """Enter it around the run. The two files get their names, with the next free number, when it is left."""

    def __init__(self, place: Place, num_replicas: int, num_stages: int) -> None:
        self._place = place
        number = 0
        while place.size_bytes(f"_steps-{number:05d}.parquet") is not None:
            number += 1
        self._names = (f"_steps-{number:05d}.parquet", f"_trace-{number:05d}.json")
        self._paths = tuple(Path(place.working, name + ".tmp") for name in self._names)
        self._submitted: list[deque[_Submitted]] = [deque() for _ in range(num_replicas)]
        self._stage_ends = [[0.0] * num_stages for _ in range(num_replicas)]
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        steps, trace = self._paths
        self._writer = pq.ParquetWriter(steps, STEPS_SCHEMA, compression="zstd")
        self._trace: IO[str] = trace.open("w", encoding="utf-8")
        self._trace.write('{"displayTimeUnit":"ms","traceEvents":[\n')
        self._is_first = True
        for replica, ends in enumerate(self._stage_ends):
            self._event(ph="M", pid=replica, name="process_name", args={"name": f"replica {replica}"})
            for stage in range(len(ends)):
                self._event(ph="M", pid=replica, tid=stage, name="thread_name", args={"name": f"stage {stage}"})
        self._started = perf_counter()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._flush()
        self._writer.close()
        self._trace.write("\n]}\n")
        self._trace.close()
        for path, name in zip(self._paths, self._names, strict=True):
            sync(path)
            self._place.publish(path, name)

    def submitted(self, replica: int, step: Step) -> None:
        is_decode = step.query_lengths == 1
        self._submitted[replica].append(
            _Submitted(
                perf_counter() - self._started,
                int(is_decode.sum()),
                int((~is_decode).sum()),
                int(step.query_lengths[~is_decode].sum()),
                int(step.context_lengths.sum()),
            )
        )

    def ended(self, replica: int, result: StepResult, occupancy: Occupancy) -> None:
        """The oldest step of the replica that has not ended yet."""
        step, now = self._submitted[replica].popleft(), perf_counter() - self._started
        row = {
            "replica": replica,
            "step": result.step_id,
            "submitted_seconds": step.seconds,
            "ended_seconds": now,
            "decodes": step.decodes,
            "prompts": step.prompts,
            "prompt_tokens": step.prompt_tokens,
            "context_tokens": step.context_tokens,
            "sampled": len(result.token_ids),
            "running": occupancy.num_running,
            "device_blocks": occupancy.num_device_blocks,
            "host_blocks": occupancy.num_host_blocks,
            "stage_seconds": list(result.stage_seconds),
            "stall_seconds": sum(use.stall_seconds for use in result.link_uses),
            "loaded_bytes": sum(use.loaded_bytes for use in result.link_uses),
            "stored_bytes": sum(use.stored_bytes for use in result.link_uses),
        }
        self._rows.append(row)
        self._draw(row)
        if len(self._rows) >= _BATCH_ROWS:
            self._flush()

    def forget(self, replica: int) -> None:
        """The replica's steps in flight are lost."""
        self._submitted[replica].clear()

    def _draw(self, row: dict[str, Any]) -> None:
        name = "prefill" if not row["decodes"] else "mixed" if row["prompts"] else "decode"
        keys = ("step", "decodes", "prompts", "prompt_tokens", "context_tokens", "sampled", "stall_seconds")
        args = {key: row[key] for key in keys}
        ends, end = self._stage_ends[row["replica"]], row["ended_seconds"]
        begins = []
        for seconds in reversed(row["stage_seconds"]):
            begins.append(end := end - seconds)
        for stage, (begin, seconds) in enumerate(zip(reversed(begins), row["stage_seconds"], strict=True)):
            begin = max(begin, ends[stage])
            ends[stage] = begin + seconds
            self._event(
                ph="X", pid=row["replica"], tid=stage, name=name, ts=_micro(begin), dur=_micro(seconds), args=args
            )
        counters = {"sequences": ("running",), "KV blocks": ("device_blocks", "host_blocks")}
        for counter, fields in counters.items():
            values = {field: row[field] for field in fields}
            self._event(ph="C", pid=row["replica"], name=counter, ts=_micro(row["ended_seconds"]), args=values)

    def _event(self, **event: object) -> None:
        self._trace.write("" if self._is_first else ",\n")
        self._is_first = False
        self._trace.write(json.dumps(event, separators=(",", ":")))

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, STEPS_SCHEMA))
            self._rows = []


def _micro(seconds: float) -> float:
    return round(seconds * 1e6, 1)
