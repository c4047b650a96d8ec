"""Sampling settings and sequences for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from batchpipe.types import SamplingParams, SequenceStart
from tests.scheduler.scheduler_cases import sampling

NEUTRAL = sampling(max_tokens=64)


def sequence_start(
    sequence_id: int,
    params: SamplingParams,
    *,
    stream: int = 1,
    prompt: Sequence[int] = (1, 2, 3),
    generated: Sequence[int] = (),
) -> SequenceStart:
    return SequenceStart(sequence_id, stream, params, np.array(prompt, np.int32), tuple(generated))


def settings(**changes: Any) -> SamplingParams:
    return replace(NEUTRAL, **changes)
