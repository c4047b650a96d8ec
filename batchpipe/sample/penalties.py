"""Repetition, presence and frequency penalties of one sequence, updated token by token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from batchpipe.types import Int32Array, SamplingParams


class Penalties:
    """Counts of the distinct tokens of a sequence; the time of a step grows with the number of distinct tokens only.

    The repetition penalty applies to prompt and generated tokens, the other two to generated tokens only. Therefore
    prompt tokens are in the table with a count of 0.
    """

    def __init__(self, sampling: SamplingParams, prompt_token_ids: Int32Array, generated: Sequence[int]) -> None:
        self._repetition = sampling.repetition_penalty
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        prompt = np.unique(prompt_token_ids) if self._repetition != 1.0 else prompt_token_ids[:0]
        self._num_tokens = len(prompt)
        self._places = {token_id: place for place, token_id in enumerate(prompt.tolist())}
        self._token_ids = np.zeros(max(64, 2 * len(prompt)), np.int64)
        self._token_ids[: len(prompt)] = prompt
        self._counts = np.zeros(len(self._token_ids), np.float32)
        for token_id in generated:
            self.observe(token_id)

    @staticmethod
    def needed(sampling: SamplingParams) -> bool:
        neutral = (1.0, 0.0, 0.0)
        return (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != neutral

    def observe(self, token_id: int) -> None:
        """Count a generated token."""
        place = self._places.get(token_id)
        if place is None:
            place = self._num_tokens
            if place == len(self._token_ids):
                self._token_ids = np.concatenate([self._token_ids, np.zeros_like(self._token_ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._places[token_id] = place
            self._token_ids[place] = token_id
            self._num_tokens += 1
        self._counts[place] += 1

    def apply(self, values: NDArray[np.float32]) -> None:
        """values [V]: logits, changed in place."""
        token_ids = self._token_ids[: self._num_tokens]
        counts = self._counts[: self._num_tokens]
        seen = values[token_ids]
        if self._repetition != 1.0:
            seen = np.where(seen < 0, seen * self._repetition, seen / self._repetition)
        seen -= self._frequency * counts
        seen -= self._presence * (counts > 0)
        values[token_ids] = seen
