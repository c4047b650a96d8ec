"""Which ids were seen before, among hundreds of millions, in bounded memory.

Ids are kept as 128-bit hashes. New ones go to a set in memory; when the set is full it becomes a sorted run in an
unnamed, memory-mapped temporary file. A run is merged with the one before it unless that is more than twice its size,
so there are few runs to search (as in a log-structured merge tree). Two different ids with the same hash would be
taken for duplicates: with a billion ids, this happens in one of 10^21 jobs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

UInt64Array = NDArray[np.uint64]  # a run is [2, n]: first and second halves of the hashes, sorted by the first

RECENT_IDS = 262_144  # size of the set in memory, about 30 MB
MERGE_IDS = 1_048_576  # ids in memory while two runs are merged, about 50 MB


class SeenIds:
    """Runs are spilled to `folder` (None: the system's temporary folder); the files vanish with the process."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._recent: set[bytes] = set()
        self._runs: list[UInt64Array] = []

    def add_batch(self, ids: Sequence[str]) -> list[bool]:
        """For each id, whether it was seen in an earlier batch or earlier in this one."""
        digests = [xxhash.xxh3_128_digest(row_id.encode()) for row_id in ids]
        if not self._runs and len(set(digests)) == len(digests) and self._recent.isdisjoint(digests):
            seen = [False] * len(digests)
            self._recent.update(digests)
        else:
            seen = self._in_runs(digests)
            for position, digest in enumerate(digests):
                seen[position] = seen[position] or digest in self._recent
                self._recent.add(digest)
        if len(self._recent) >= RECENT_IDS:
            self._spill()
        return seen

    def _in_runs(self, digests: list[bytes]) -> list[bool]:
        halves = np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 2)
        order = np.argsort(halves[:, 0])  # sorted look-ups touch each page of a run once
        high, low = halves[order, 0], halves[order, 1]
        found = np.zeros(len(digests), dtype=np.bool_)
        for run in self._runs:
            positions = np.searchsorted(run[0], high)
            positions[positions == run.shape[1]] = 0
            for index in np.flatnonzero(run[0][positions] == high):
                end = np.searchsorted(run[0], high[index], side="right")
                found[index] |= low[index] in run[1, positions[index] : end]
        seen = np.empty_like(found)
        seen[order] = found
        return list(seen.tolist())

    def _spill(self) -> None:
        halves = np.frombuffer(b"".join(self._recent), dtype=np.uint64).reshape(-1, 2)
        run = self._new_run(len(halves))
        run[:] = halves[np.argsort(halves[:, 0])].T
        self._recent.clear()
        while self._runs and self._runs[-1].shape[1] <= 2 * run.shape[1]:
            run = self._merge(self._runs.pop(), run)
        self._runs.append(run)

    def _merge(self, older: UInt64Array, newer: UInt64Array) -> UInt64Array:
        """Merges two sorted runs, piece by piece between pivots taken from the older one."""
        merged = self._new_run(older.shape[1] + newer.shape[1])
        pivots = older[0, MERGE_IDS // 2 :: MERGE_IDS // 2]
        starts = [0, 0]
        written = 0
        for pivot in [*pivots, None]:
            pieces = []
            for which, run in enumerate((older, newer)):
                end = run.shape[1] if pivot is None else int(np.searchsorted(run[0], pivot))
                pieces.append(run[:, starts[which] : end])
                starts[which] = end
            both = np.concatenate(pieces, axis=1)
            merged[:, written : written + both.shape[1]] = both[:, np.argsort(both[0])]
            written += both.shape[1]
        return merged

    def _new_run(self, num_ids: int) -> UInt64Array:
        with tempfile.TemporaryFile(dir=self._folder) as file:  # the mapping keeps the unnamed file alive
            return np.memmap(file, dtype=np.uint64, mode="w+", shape=(2, num_ids))
