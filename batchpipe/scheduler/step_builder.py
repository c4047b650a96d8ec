"""From the chosen sequences to an immutable `Step`: the arrays that every stage obeys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from batchpipe.scheduler.sequence import SequenceState
from batchpipe.types import Int32Array, SequenceStart, Step


class PrefillChunk(NamedTuple):
    """`num_tokens` new tokens of a sequence behind `num_context` tokens; `samples`: a token is sampled at their end."""

    sequence: SequenceState
    num_context: int
    num_tokens: int
    samples: bool


class BlockTables:
    """The block tables of all running sequences as one array, so that a step's tables are one indexed copy."""

    def __init__(self, num_slots: int) -> None:
        self._table = np.zeros((num_slots, 8), dtype=np.int32)
        self._free_slots = list(range(num_slots - 1, -1, -1))

    def take_slot(self) -> int:
        return self._free_slots.pop()

    def release_slot(self, slot: int) -> None:
        self._free_slots.append(slot)

    def append(self, slot: int, position: int, blocks: Sequence[int]) -> None:
        end = position + len(blocks)
        if end > self._table.shape[1]:
            wider = np.zeros((self._table.shape[0], max(end, 2 * self._table.shape[1])), dtype=np.int32)
            wider[:, : self._table.shape[1]] = self._table
            self._table = wider
        self._table[slot, position:end] = blocks

    def gather(self, slots: Sequence[int], num_blocks: int) -> Int32Array:
        """[len(slots), num_blocks]; places behind a sequence's last block hold any valid number."""
        return self._table[np.asarray(slots, dtype=np.intp), :num_blocks]


def build_step(
    step_id: int,
    decodes: Sequence[SequenceState],
    prefills: Sequence[PrefillChunk],
    tables: BlockTables,
    block_tokens: int,
    started: Sequence[SequenceState],
    released: Sequence[int],
    copied_blocks: Sequence[tuple[int, int]],
) -> Step:
    """Decodes come first: each has one new token, the one that it sampled last, known here or not."""
    sequences = [*decodes, *[chunk.sequence for chunk in prefills]]
    num_decodes = len(decodes)
    query_lengths = np.ones(len(sequences), dtype=np.int32)
    query_lengths[num_decodes:] = [chunk.num_tokens for chunk in prefills]
    samples = np.ones(len(sequences), dtype=np.bool_)
    samples[num_decodes:] = [chunk.samples for chunk in prefills]
    contexts = [sequence.num_scheduled - 1 for sequence in decodes] + [chunk.num_context for chunk in prefills]
    context_lengths = np.array(contexts, dtype=np.int32)
    last_ids = [sequence.generated[-1] if not sequence.num_unknown else ~sequence.sampled_row for sequence in decodes]
    token_ids = [np.array(last_ids, dtype=np.int32)]
    token_ids += [
        chunk.sequence.token_slice(chunk.num_context, chunk.num_context + chunk.num_tokens) for chunk in prefills
    ]
    num_blocks = -(-int((context_lengths + query_lengths).max()) // block_tokens)
    return Step(
        step_id=step_id,
        sequence_ids=tuple([sequence.sequence_id for sequence in sequences]),
        query_lengths=query_lengths,
        context_lengths=context_lengths,
        token_ids=np.concatenate(token_ids),
        block_tables=tables.gather([sequence.slot for sequence in sequences], num_blocks),
        samples=samples,
        copied_blocks=np.array(copied_blocks, dtype=np.int32).reshape(-1, 2),
        started=tuple(start_of(sequence) for sequence in started),
        released=tuple(released),
    )


def start_of(sequence: SequenceState) -> SequenceStart:
    return SequenceStart(
        sequence_id=sequence.sequence_id,
        stream=sequence.stream,
        sampling=sequence.group.request.sampling,
        prompt_token_ids=sequence.prompt,
        generated_token_ids=tuple(sequence.generated),
    )
