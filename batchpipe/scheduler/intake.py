"""From a request to its sequences: one a sample, each with a random stream and a stop matcher of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from batchpipe.scheduler.sequence import RequestGroup, SequenceState, StopMatcher
from batchpipe.types import Request


class Intake:
    def __init__(
        self,
        eos_token_ids: frozenset[int],
        stream_of: Callable[[int, str, int], int],
        matcher_of: Callable[[Request], StopMatcher | None],
    ) -> None:
        self._eos_token_ids = eos_token_ids
        self._stream_of = stream_of
        self._matcher_of = matcher_of
        self._next_sequence_id = 0

    def sequences_of(self, request: Request) -> Iterator[SequenceState]:
        sampling = request.sampling
        group = RequestGroup(request, [None] * sampling.n, sampling.n)
        eos_token_ids = frozenset[int]() if sampling.ignore_eos else self._eos_token_ids
        for sample_index in range(sampling.n):
            yield SequenceState(
                sequence_id=self._next_sequence_id,
                group=group,
                sample_index=sample_index,
                stream=self._stream_of(sampling.seed, request.key.row_id, sample_index),
                matcher=self._matcher_of(request),
                prompt=request.prompt_token_ids,
                num_tokens=len(request.prompt_token_ids),
                max_tokens=sampling.max_tokens,
                end_token_ids=eos_token_ids.union(sampling.stop_token_ids),
                length_class=request.length_class,
            )
            self._next_sequence_id += 1
