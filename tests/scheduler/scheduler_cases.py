"""Requests, a scheduler and a fake pipeline that would notice any wrong block table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from batchpipe.job.sampling import Sampling
from batchpipe.pipeline.fake import FakePipeline, fake_kv
from batchpipe.scheduler.scheduler import Scheduler
from batchpipe.types import (
    Capacity,
    Carried,
    Completion,
    FinishReason,
    Request,
    RowKey,
    SamplingParams,
)

GREEDY = Sampling().params()
VOCABULARY, EOS = 97, 96
NOTHING = pa.RecordBatch.from_pylist([{}], schema=pa.schema([]))


def sampling(**changes: Any) -> SamplingParams:
    return replace(GREEDY, **{"max_tokens": 20, **changes})


def request(index: int, num_prompt: int, *, num_shared: int = 0, **changes: Any) -> Request:
    """A random prompt whose first `num_shared` tokens are those of every other request's."""
    tokens = np.random.default_rng(index).integers(0, VOCABULARY - 1, num_prompt).astype(np.int32)
    shared = np.random.default_rng(999).integers(0, VOCABULARY - 1, num_shared).astype(np.int32)
    tokens[: min(num_shared, num_prompt)] = shared[:num_prompt]
    return Request(RowKey(index, str(index), Carried(NOTHING, 0)), tokens, sampling(**changes))


def capacity(**changes: Any) -> Capacity:
    small = Capacity(
        num_blocks=64, block_tokens=4, num_stages=1, max_batches=1, max_step_tokens=32, max_batch_sequences=8
    )
    return replace(small, **changes)


def scheduler_for(offered: Capacity, schedule: str = "hybrid") -> Scheduler:
    return Scheduler(offered, schedule, frozenset({EOS}), lambda seed, row_id, sample: 0, lambda params: None)


def expected(request: Request, model: FakePipeline) -> Completion:
    """What the fake model says with the whole context in one piece."""
    tokens = request.prompt_token_ids
    generated: list[int] = []
    params = request.sampling
    while True:
        context = np.concatenate([tokens, np.array(generated, dtype=np.int32)])
        total = fake_kv(context, np.arange(len(context))).sum(dtype=np.uint64)
        token = int(model.next_of(np.array([total]))[0])
        generated.append(token)
        if (token == EOS and not params.ignore_eos) or token in params.stop_token_ids:
            return Completion(tuple(generated), FinishReason.STOP)
        if len(generated) == params.max_tokens:
            return Completion(tuple(generated), FinishReason.LENGTH)


def fake(offered: Capacity) -> FakePipeline:
    return FakePipeline(offered, VOCABULARY, EOS)
