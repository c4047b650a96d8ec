"""Samples the next token of every sequence of a step.

Rows with plain greedy sampling take one argmax for the whole batch. Every other row is processed alone, in float32 on
the host: bias, penalties, temperature, truncation, sampling. Its token depends on its own logits, tokens and random
stream only, not on the rest of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchpipe.sample.draw import draw
from batchpipe.sample.greedy import INVALID_TOKEN, greedy_tokens
from batchpipe.sample.logprobs import token_logprobs
from batchpipe.sample.penalties import Penalties
from batchpipe.sample.rng import uniforms
from batchpipe.types import Int32Array, SequenceStart, Step, TokenLogprobs

# Lower temperatures are greedy: dividing float32 logits by them would overflow before it changed a choice.
COLDEST_TEMPERATURE = 1e-5


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """token_ids [N], -1 for logits that are not finite; `logprobs` by sequence id, of the sequences that want them."""

    token_ids: Int32Array
    logprobs: dict[int, TokenLogprobs]


class Sampler:
    """Samples tokens, and keeps for each running sequence the state that its sampling settings need.

    Call `start` before a sequence's first step, also after a preemption, and `release` when it ends or is preempted.
    """

    def __init__(self, vocabulary_size: int, eos_token_ids: Sequence[int]) -> None:
        self._vocabulary_size = vocabulary_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._sequences: dict[int, _Sequence] = {}
        self._values = np.empty(vocabulary_size, np.float32)

    def start(self, start: SequenceStart) -> None:
        self._sequences[start.sequence_id] = _Sequence(start, self._eos_token_ids)

    def release(self, sequence_id: int) -> None:
        del self._sequences[sequence_id]

    @torch.inference_mode()
    def sample_step(self, step: Step, logits: Tensor) -> SampledTokens:
        """One token of every sequence of the step that samples; logits [N, V] of these, in the step's order."""
        for sequence_id in step.released:
            self.release(sequence_id)
        for start in step.started:
            self.start(start)
        return self.sample(logits, [i for i, samples in zip(step.sequence_ids, step.samples, strict=True) if samples])

    def sample(self, logits: Tensor, sequence_ids: Sequence[int]) -> SampledTokens:
        """logits [N, V], any float type and device; row i belongs to `sequence_ids[i]`."""
        assert logits.shape == (len(sequence_ids), self._vocabulary_size), (logits.shape, len(sequence_ids))
        sequences = [self._sequences[sequence_id] for sequence_id in sequence_ids]
        token_ids = greedy_tokens(logits)
        logprobs: dict[int, TokenLogprobs] = {}
        adjusted = [i for i, one in enumerate(sequences) if not one.plain and token_ids[i] != INVALID_TOKEN]
        if adjusted:
            host_logits = logits.cpu()
            row_uniforms = uniforms(
                np.array([sequences[i].stream for i in adjusted], np.int64),
                np.array([sequences[i].num_generated for i in adjusted], np.int64),
            )
            for i, uniform in zip(adjusted, row_uniforms.tolist(), strict=True):
                token_id = self._sample_row(host_logits[i], sequences[i], uniform)
                token_ids[i] = token_id
                if sequences[i].num_top_logprobs and token_id != INVALID_TOKEN:
                    raw = self._row(host_logits[i])
                    logprobs[sequence_ids[i]] = token_logprobs(raw, token_id, sequences[i].num_top_logprobs)
        for sequence, token_id in zip(sequences, token_ids.tolist(), strict=True):
            if token_id != INVALID_TOKEN:
                sequence.observe(token_id)
        return SampledTokens(token_ids, logprobs)

    def _sample_row(self, logits: Tensor, sequence: _Sequence, uniform: float) -> int:
        """logits [V] -> one token, or INVALID_TOKEN if the settings leave none possible."""
        values = self._row(logits)
        sequence.adjust(values)
        best_token = int(values.argmax())
        best = values[best_token]
        if not np.isfinite(best):
            return INVALID_TOKEN
        sampling = sequence.sampling
        if sampling.temperature < COLDEST_TEMPERATURE:
            return best_token
        return draw(
            values,
            best=best,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            uniform=uniform,
        )

    def _row(self, logits: Tensor) -> NDArray[np.float32]:
        """logits [V] in float32, in a buffer that the next call overwrites."""
        # numpy only: torch would wake its threads for every row, which is slow while the cores are busy.
        if logits.dtype == torch.bfloat16:
            bits = logits.view(torch.int16).numpy().view(np.uint16)
            np.left_shift(bits, 16, out=self._values.view(np.uint32), dtype=np.uint32)
        else:
            self._values[:] = logits.numpy()
        return self._values


class _Sequence:
    """Sampling settings and state of one running sequence."""

    def __init__(self, start: SequenceStart, eos_token_ids: tuple[int, ...]) -> None:
        sampling = start.sampling
        self.sampling = sampling
        self.stream = start.stream
        self.num_generated = len(start.generated_token_ids)
        self.num_top_logprobs = sampling.logprobs
        self._bias_token_ids = np.array(list(sampling.logit_bias), np.int64)
        self._bias = np.array(list(sampling.logit_bias.values()), np.float32)
        eos = () if sampling.ignore_eos else eos_token_ids
        self._ending_token_ids = np.array([*eos, *sampling.stop_token_ids], np.int64)
        self._penalties: Penalties | None = None
        if Penalties.needed(sampling):
            self._penalties = Penalties(sampling, start.prompt_token_ids, start.generated_token_ids)
        self._adjusts_always = bool(
            sampling.temperature >= COLDEST_TEMPERATURE or sampling.logprobs or sampling.logit_bias or self._penalties
        )

    @property
    def plain(self) -> bool:
        """Whether this step's token is the argmax of the unchanged logits, without log probabilities."""
        return not self._adjusts_always and self.num_generated >= self.sampling.min_tokens

    def adjust(self, values: NDArray[np.float32]) -> None:
        """values [V]: logits, changed in place by bias, minimum length and penalties."""
        if len(self._bias):
            values[self._bias_token_ids] += self._bias
        if self.num_generated < self.sampling.min_tokens:
            values[self._ending_token_ids] = -np.inf
        if self._penalties:
            self._penalties.apply(values)

    def observe(self, token_id: int) -> None:
        """Updates the state with the token that this step generated."""
        self.num_generated += 1
        if self._penalties:
            self._penalties.observe(token_id)
