"""What fits a GPU's memory beside the weights: the largest step, tried before KV is sized, and steps as they come.

The allocator's fragments, libraries' workspaces and other programs on the card are never known exactly. So a step that
runs out of memory is run again in parts, and so is every later one that is as large.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchpipe.attention.base import AttentionBackend, AttentionInputs, AttentionOptions
from batchpipe.errors import MemoryLimitError
from batchpipe.pipeline.model_runner.base import ModelRunner, StagePart
from batchpipe.types import Int32Array, Step

logger = logging.getLogger(__name__)

# For CUDA graphs, the libraries' workspaces and what the allocator cannot use: a part of the card, within bounds.
_RESERVED_PART = 32
_LEAST_RESERVED_BYTES = 256 << 20
_MOST_RESERVED_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class StepRoom:
    """max_tokens: of the largest step that runs as a whole. free_bytes: what is left for KV beside it."""

    max_tokens: int
    free_bytes: int


def room_beside_steps(part: StagePart, hidden_size: int, dtype: torch.dtype, device: torch.device) -> StepRoom:
    """Runs the model over its largest step, without KV. Raises MemoryLimitError where not even one sequence fits."""
    max_tokens = part.max_step_tokens
    while (peak_bytes := _peak_bytes(part, max_tokens, hidden_size, dtype, device)) is None:
        if max_tokens == 1:
            raise MemoryLimitError(
                "engine.num_stages: the weights leave no memory for a step of one token; ask for more stages, or "
                "for engine.max_batch_sequences below " + str(part.max_batch_sequences)
            )
        max_tokens = -(-max_tokens // 2)
    if max_tokens < part.max_step_tokens:
        logger.warning(
            "steps of %d tokens do not fit %s beside the weights; larger ones are run in parts of %d",
            part.max_step_tokens, device, max_tokens,
        )  # fmt: skip
    torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    reserved_bytes = min(_MOST_RESERVED_BYTES, max(_LEAST_RESERVED_BYTES, total_bytes // _RESERVED_PART))
    return StepRoom(max_tokens, max(0, free_bytes - peak_bytes - reserved_bytes))


class _NoAttention:
    """Takes the memory that attention takes, and computes nothing."""

    name = "none"
    default_block_tokens = 16

    def forward(
        self, inputs: AttentionInputs, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        return query.clone(memory_format=torch.contiguous_format)


def _peak_bytes(
    part: StagePart, num_tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> int | None:
    """Of a step's activations; None where they do not fit."""
    nothing = torch.empty(0, dtype=torch.int32)
    pool: Any = None  # what `_NoAttention` never looks at
    inputs = AttentionInputs(
        query_lengths=nothing, context_lengths=nothing, query_starts=nothing, block_tables=nothing, positions=nothing,
        pool=pool, backend=_NoAttention(), first_layer=part.first_layer,
    )  # fmt: skip
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    try:
        positions = torch.arange(num_tokens, device=device)
        source = positions * 0
        if not part.is_first:
            source = torch.zeros(num_tokens, hidden_size, dtype=dtype, device=device)
        rows = positions[: part.max_batch_sequences] if part.is_last else None
        part.model.forward(inputs, source, positions, rows)
    except torch.OutOfMemoryError:
        return None
    return int(torch.cuda.max_memory_allocated(device)) - int(before)


class FittingRunner:
    """See `ModelRunner`: runs steps of up to `max_tokens` new tokens as a whole, others part by part."""

    def __init__(self, runner: ModelRunner, max_tokens: int) -> None:
        self._runner = runner
        self._max_tokens = max_tokens

    def run(
        self,
        step: Step,
        hidden: Tensor | None,
        backend: AttentionBackend,
        staging_slots: Int32Array | None,
        sampled_before: Tensor | None,
    ) -> Tensor:
        while len(step.token_ids) <= self._max_tokens:
            try:
                return self._runner.run(step, hidden, backend, staging_slots, sampled_before)
            except torch.OutOfMemoryError as error:
                said = str(error)
            # Outside of the handler, which keeps the failed step's tensors.
            self._shrink(len(step.token_ids), said)
        if step.transfers is not None:
            raise MemoryLimitError(
                f"engine.max_step_tokens: a step of {len(step.token_ids)} tokens does not fit the GPU's memory, and "
                f"with kv_host_memory steps are not run in parts; set it to {self._max_tokens} or less, or lower "
                "engine.kv_device_memory"
            )
        outputs = []
        for part, tokens in parts_of(step, self._max_tokens):
            own = None if hidden is None else hidden[tokens]
            # A recorded step's output stands where the next part's will.
            outputs.append(self.run(part, own, backend, None, sampled_before).clone())
        return torch.cat(outputs)

    def _shrink(self, num_tokens: int, said: str) -> None:
        if num_tokens == 1:
            raise MemoryLimitError(
                "engine.kv_device_memory: a step of one token does not fit the GPU's memory beside the KV; lower it "
                f"({said.splitlines()[0]})"
            )
        torch.cuda.empty_cache()
        self._max_tokens = num_tokens // 2
        logger.warning(
            "a step of %d tokens ran out of the GPU's memory; steps are run in parts of %d from now on, and "
            "a lower engine.max_step_tokens or engine.kv_device_memory would avoid it", num_tokens, self._max_tokens,
        )  # fmt: skip


def parts_of(step: Step, max_tokens: int) -> Iterator[tuple[Step, slice]]:
    """The step as steps of at most `max_tokens` new tokens, in order, each with its place among the step's tokens.

    Together they sample what the step samples, in its order.
    """
    starts = np.cumsum(step.query_lengths) - step.query_lengths
    pieces: list[tuple[int, int, int]] = []  # sequence, its first new token, their number
    room = max_tokens
    for sequence, length in enumerate(step.query_lengths.tolist()):
        done = 0
        while done < length:
            if room == 0:
                yield _part(step, pieces, starts)
                pieces, room = [], max_tokens
            number = min(room, length - done)
            pieces.append((sequence, done, number))
            done, room = done + number, room - number
    yield _part(step, pieces, starts)


def _part(step: Step, pieces: list[tuple[int, int, int]], starts: Int32Array) -> tuple[Step, slice]:
    sequences, firsts, numbers = (np.array(column, np.int32) for column in zip(*pieces, strict=True))
    begin = int(starts[sequences[0]] + firsts[0])
    tokens = slice(begin, begin + int(numbers.sum()))
    is_last = firsts + numbers == step.query_lengths[sequences]
    part = replace(
        step,
        sequence_ids=tuple(step.sequence_ids[sequence] for sequence in sequences),
        query_lengths=numbers,
        context_lengths=(step.context_lengths[sequences] + firsts).astype(np.int32),
        token_ids=step.token_ids[tokens],
        block_tables=step.block_tables[sequences],
        samples=step.samples[sequences] & is_last,
        copied_blocks=step.copied_blocks[:0],
    )
    return part, tokens
