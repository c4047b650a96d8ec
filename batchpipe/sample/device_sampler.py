"""Samples a step's tokens on the GPU, where the next step can begin with them before the host has heard of them.

What only the host's sampler can do (`samples_on_device` says what) is done there, for those rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from batchpipe.sample.on_device import samples_on_device
from batchpipe.sample.rng import uniforms
from batchpipe.sample.sampler import COLDEST_TEMPERATURE, SampledTokens, Sampler
from batchpipe.sample.triton_sampling import launch_sampling
from batchpipe.types import SamplingParams, Step, TokenLogprobs

_NUM_SLOTS = 3  # of pinned memory: steps whose tokens are on their way, and the one that is filled in


@dataclass(slots=True)
class _DeviceSequence:
    sampling: SamplingParams
    stream: int
    num_sampled: int


@dataclass(slots=True)
class _Slot:
    parameters: Tensor  # float32 [5, N], pinned
    tokens: Tensor  # int32 [N], pinned


@dataclass(slots=True)
class PendingTokens:
    """A step's tokens on their way to the host. `done` is recorded behind all that `DeviceSampler.take` reads."""

    slot: _Slot
    num_rows: int
    done: torch.cuda.Event
    host_rows: list[int] = field(default_factory=list)
    host_ids: list[int] = field(default_factory=list)
    host_logits: Tensor | None = None


class DeviceSampler:
    """`launch` queues a step's sampling, `take` waits for it; in the order of the steps, one or two steps apart.

    sampled: int32 [max_sequences] on the device, the tokens of the step launched last.
    """

    def __init__(
        self, vocabulary_size: int, eos_token_ids: Sequence[int], device: torch.device, max_sequences: int
    ) -> None:
        self.sampled = torch.zeros(max_sequences, dtype=torch.int32, device=device)
        self._host = Sampler(vocabulary_size, eos_token_ids)
        self._device = device
        self._sequences: dict[int, _DeviceSequence] = {}
        self._parameters = torch.zeros(5, max_sequences, dtype=torch.float32, device=device)
        self._is_pinned = device.type == "cuda"
        self._slots = [
            _Slot(
                torch.zeros(5, max_sequences, dtype=torch.float32, pin_memory=self._is_pinned),
                torch.zeros(max_sequences, dtype=torch.int32, pin_memory=self._is_pinned),
            )
            for _ in range(_NUM_SLOTS)
        ]
        self._num_launched = 0

    def launch(self, step: Step, logits: Tensor) -> PendingTokens:
        """logits [N, V] of the step's sequences that sample, on the device; they may change once the stream goes on."""
        self._register(step)
        sampling_ids = [i for i, samples in zip(step.sequence_ids, step.samples, strict=True) if samples]
        pending = PendingTokens(
            self._slots[self._num_launched % _NUM_SLOTS], len(sampling_ids), torch.cuda.Event(enable_timing=True)
        )
        self._num_launched += 1
        for row, sequence_id in enumerate(sampling_ids):
            if sequence_id not in self._sequences:
                pending.host_rows.append(row)
                pending.host_ids.append(sequence_id)
        if sampling_ids:
            tokens = self.sampled[: len(sampling_ids)]
            launch_sampling(tokens, logits, self._parameters_of(sampling_ids, pending.slot))
            pending.slot.tokens[: len(sampling_ids)].copy_(tokens, non_blocking=True)
        if pending.host_rows:
            rows = torch.tensor(pending.host_rows, device=self._device)
            width, dtype = logits.shape[1], logits.dtype
            pending.host_logits = torch.empty(len(rows), width, dtype=dtype, pin_memory=self._is_pinned)
            pending.host_logits.copy_(logits[rows], non_blocking=True)
        pending.done.record(torch.cuda.current_stream(self._device))
        return pending

    def take(self, pending: PendingTokens) -> SampledTokens:
        """Waits for the tokens; the host's rows are sampled here."""
        pending.done.synchronize()
        token_ids = pending.slot.tokens[: pending.num_rows].numpy().copy()
        logprobs: dict[int, TokenLogprobs] = {}
        if pending.host_logits is not None:
            found = self._host.sample(pending.host_logits, pending.host_ids)
            token_ids[pending.host_rows] = found.token_ids
            logprobs = found.logprobs
        return SampledTokens(token_ids, logprobs)

    def sample_step(self, step: Step, logits: Tensor) -> SampledTokens:
        """Both at once."""
        return self.take(self.launch(step, logits))

    def _register(self, step: Step) -> None:
        for sequence_id in step.released:
            if self._sequences.pop(sequence_id, None) is None:
                self._host.release(sequence_id)
        for start in step.started:
            if samples_on_device(start.sampling):
                self._sequences[start.sequence_id] = _DeviceSequence(
                    start.sampling, start.stream, len(start.generated_token_ids)
                )
            else:
                self._host.start(start)

    def _parameters_of(self, sequence_ids: Sequence[int], slot: _Slot) -> Tensor | None:
        """[5, N] on the device, None where all rows are greedy. Counts a token of each sequence."""
        rows, streams, counts = [], [], []
        for row, sequence_id in enumerate(sequence_ids):
            sequence = self._sequences.get(sequence_id)
            if sequence is None:
                continue
            if sequence.sampling.temperature >= COLDEST_TEMPERATURE:
                rows.append((row, sequence.sampling))
                streams.append(sequence.stream)
                counts.append(sequence.num_sampled)
            sequence.num_sampled += 1
        if not rows:
            return None
        host = slot.parameters.numpy()
        host[0, : len(sequence_ids)] = 0
        at = [row for row, _ in rows]
        host[:, at] = np.array(
            [[s.temperature, s.top_k, s.top_p, s.min_p, 0.0] for _, s in rows], np.float32
        ).T  # fmt: skip
        host[4, at] = uniforms(np.array(streams, np.int64), np.array(counts, np.int64))
        parameters = self._parameters[:, : len(sequence_ids)]
        parameters.copy_(slot.parameters[:, : len(sequence_ids)], non_blocking=True)
        return parameters
