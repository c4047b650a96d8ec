"""The sequences that wait for admission: in order of arrival, but prompts with a common beginning stand together."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from batchpipe.scheduler.sequence import SequenceState

# A beginning shorter than this is not worth waiting for.
GROUP_TOKENS = 64


class WaitingQueue:
    """Groups of sequences, by the first tokens of their prompts. A group is closed once one of it was admitted, so that
    no other group waits for ever.
    """

    def __init__(self) -> None:
        self._groups: deque[deque[SequenceState]] = deque()
        self._open: dict[bytes, deque[SequenceState]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[SequenceState]:
        for group in self._groups:
            yield from group

    @property
    def first(self) -> SequenceState:
        return self._groups[0][0]

    def append(self, sequence: SequenceState) -> None:
        self._size += 1
        if len(sequence.prompt) <= GROUP_TOKENS:
            self._groups.append(deque([sequence]))
            return
        beginning = sequence.prompt[:GROUP_TOKENS].tobytes()
        group = self._open.get(beginning)
        if group is None:
            group = self._open[beginning] = deque()
            self._groups.append(group)
        group.append(sequence)

    def put_back(self, sequence: SequenceState) -> None:
        """A preempted sequence comes first."""
        self._size += 1
        self._groups.appendleft(deque([sequence]))

    def pop(self) -> SequenceState:
        self._size -= 1
        group = self._groups[0]
        sequence = group.popleft()
        if self._open.get(beginning := sequence.prompt[:GROUP_TOKENS].tobytes()) is group:
            del self._open[beginning]
        if not group:
            self._groups.popleft()
        return sequence
