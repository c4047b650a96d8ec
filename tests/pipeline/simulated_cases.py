"""Requests, steps and costs for the pipeline without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from batchpipe.pipeline.simulated import SimulatedPipeline
from batchpipe.sample.rng import stream_of
from batchpipe.types import Capacity, Carried, Request, RowKey, SequenceStart, Step, Transfers
from tests.cost.formula_cost import FormulaCost
from tests.scheduler.scheduler_cases import sampling

EOS = 5
NOTHING = pa.RecordBatch.from_pylist([{}], schema=pa.schema([]))
SAMPLING = sampling(max_tokens=1000)


def token_cost(seconds_per_token: Sequence[float], **changes: Any) -> FormulaCost:
    """Seconds a token on each stage; whole numbers and powers of two, so that sums are exact."""
    return FormulaCost(
        lambda stage, work: seconds_per_token[stage] * work.num_tokens, len(seconds_per_token), **changes
    )


def capacity(num_stages: int = 1, **changes: Any) -> Capacity:
    values = {
        "num_blocks": 100, "block_tokens": 4, "num_stages": num_stages, "max_batches": num_stages,
        "max_step_tokens": 64, "max_batch_sequences": 8,
    }  # fmt: skip
    return Capacity(**(values | changes))


def cases(lengths: list[tuple[int, int]], num_samples: int = 1) -> tuple[list[Request], dict[int, int]]:
    """Requests of (prompt tokens, completion tokens), and lengths by stream; every further sample is a token longer."""
    requests, by_stream = [], {}
    for index, (num_prompt, length) in enumerate(lengths):
        prompt = np.full(num_prompt, 10 + index, dtype=np.int32)
        key = RowKey(index, str(index), Carried(NOTHING, 0))
        requests.append(Request(key, prompt, replace(SAMPLING, n=num_samples)))
        for sample in range(num_samples):
            by_stream[stream_of(0, str(index), sample)] = length + sample
    return requests, by_stream


def step_of(
    step_id: int, num_tokens: int, num_context: int = 0, *, starts: bool = True, transfers: Transfers | None = None
) -> Step:
    """A step of one sequence, whose number and stream are the step's."""
    start = SequenceStart(step_id, step_id, SAMPLING, np.zeros(num_tokens, np.int32), ())
    return Step(
        step_id=step_id,
        sequence_ids=(step_id,),
        query_lengths=np.array([num_tokens], np.int32),
        context_lengths=np.array([num_context], np.int32),
        token_ids=np.zeros(num_tokens, np.int32),
        block_tables=np.zeros((1, 1), np.int32),
        samples=np.array([True]),
        copied_blocks=np.zeros((0, 2), np.int32),
        started=(start,) if starts else (),
        transfers=transfers,
    )


def idle_seconds(pipeline: SimulatedPipeline) -> tuple[float, ...]:
    """The time until now of each stage without its work, its stalls included; nothing is in flight."""
    return tuple(pipeline.stages.now_seconds - busy for busy in pipeline.stages.busy_seconds)


def pipeline_of(cost: FormulaCost, **changes: int) -> SimulatedPipeline:
    return SimulatedPipeline(capacity(cost.num_stages, **changes), cost, dict.fromkeys(range(1000), 50), EOS)
