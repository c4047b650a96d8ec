"""From chosen chunks to an immutable `Step`: the arrays that every stage obeys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from batchpipe.scheduler.sequence import SequenceState
from batchpipe.types import Int32Array, SequenceStart, Step


class Chunk(NamedTuple):
    """`num_tokens` new tokens of a sequence behind `num_context` tokens; `samples`: a token is drawn at its end."""

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
    chunks: Sequence[Chunk],
    tables: BlockTables,
    block_tokens: int,
    started: Sequence[SequenceState],
    released: Sequence[int],
    copied_blocks: Sequence[tuple[int, int]],
) -> Step:
    sequences, contexts, lengths, samples = zip(*chunks, strict=True)
    query_lengths = np.array(lengths, dtype=np.int32)
    context_lengths = np.array(contexts, dtype=np.int32)
    num_blocks = -(-int((context_lengths + query_lengths).max()) // block_tokens)
    return Step(
        step_id=step_id,
        sequence_ids=tuple([sequence.sequence_id for sequence in sequences]),
        query_lengths=query_lengths,
        context_lengths=context_lengths,
        token_ids=_token_ids(chunks),
        block_tables=tables.gather([sequence.slot for sequence in sequences], num_blocks),
        samples=np.array(samples, dtype=np.bool_),
        copied_blocks=np.array(copied_blocks, dtype=np.int32).reshape(-1, 2),
        started=tuple(start_of(sequence) for sequence in started),
        released=tuple(released),
    )


def _token_ids(chunks: Sequence[Chunk]) -> Int32Array:
    """The new tokens of all chunks, one behind the other."""
    pieces: list[Int32Array] = []
    drawn: list[int] = []  # of decodes in a row
    for sequence, num_context, num_tokens, samples in chunks:
        if samples and num_tokens == 1 and sequence.generated:
            drawn.append(sequence.generated[-1])
            continue
        pieces.append(np.array(drawn, dtype=np.int32))
        pieces.append(sequence.token_slice(num_context, num_context + num_tokens))
        drawn = []
    pieces.append(np.array(drawn, dtype=np.int32))
    return np.concatenate(pieces)


def start_of(sequence: SequenceState) -> SequenceStart:
    return SequenceStart(
        sequence_id=sequence.sequence_id,
        stream=sequence.stream,
        sampling=sequence.group.request.sampling,
        prompt_token_ids=sequence.prompt,
        generated_token_ids=tuple(sequence.generated),
    )
