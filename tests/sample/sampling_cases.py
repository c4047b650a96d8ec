"""Sampling settings and sequences for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from batchpipe.types import SamplingParams, SequenceStart

NEUTRAL = SamplingParams(
    max_tokens=64,
    temperature=0.0,
    top_p=1.0,
    top_k=0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    logit_bias={},
    stop=(),
    stop_token_ids=(),
    ignore_eos=False,
    min_tokens=0,
    n=1,
    seed=0,
    logprobs=0,
)


def sequence_start(
    sequence_id: int,
    sampling: SamplingParams,
    *,
    stream: int = 1,
    prompt: Sequence[int] = (1, 2, 3),
    generated: Sequence[int] = (),
) -> SequenceStart:
    return SequenceStart(sequence_id, stream, sampling, np.array(prompt, np.int32), tuple(generated))


def settings(**changes: Any) -> SamplingParams:
    values = {name: getattr(NEUTRAL, name) for name in SamplingParams.__slots__}
    return SamplingParams(**(values | changes))
