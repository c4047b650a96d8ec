"""Which input rows have an outcome, and which kind: sets and counts that stay small at a hundred million rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from batchpipe.types import RowStatus

Int64Array = NDArray[np.int64]
Range = tuple[int, int]  # first and last row index, both included


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Input rows by outcome. A row with a failed sample is failed, else one with a canceled sample is canceled.

    failed_by_code: of the first failed sample of a row. Tokens are those of the rows' prompts, each once, and of all
    their samples.
    """

    succeeded: int = 0
    failed: int = 0
    canceled: int = 0
    failed_by_code: Mapping[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def total(self) -> int:
        return self.succeeded + self.failed + self.canceled

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(
            self.succeeded + other.succeeded,
            self.failed + other.failed,
            self.canceled + other.canceled,
            dict(Counter(self.failed_by_code) + Counter(other.failed_by_code)),
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )


class RowSet:
    """A set of row indexes as a bitmap, with one bit for each row up to the highest index."""

    def __init__(self) -> None:
        self._bits = np.zeros(1024, dtype=np.uint8)
        self._length = 0

    def __contains__(self, row_index: object) -> bool:
        assert isinstance(row_index, int)
        byte = row_index >> 3
        return byte < len(self._bits) and bool(self._bits[byte] >> (row_index & 7) & 1)

    def __len__(self) -> int:
        return self._length

    def overlaps(self, row_indexes: Int64Array) -> bool:
        """Whether a row of `row_indexes` is in the set, or is named twice."""
        if len(np.unique(row_indexes)) != len(row_indexes):
            return True
        known = row_indexes[row_indexes >> 3 < len(self._bits)]
        return bool((self._bits[known >> 3] >> (known & 7) & 1).any())

    def add(self, row_indexes: Int64Array) -> None:
        """Adds rows that are not in the set."""
        assert not self.overlaps(row_indexes), "a row is given an outcome twice"
        if not len(row_indexes):
            return
        needed_bytes = (int(row_indexes.max()) >> 3) + 1
        if needed_bytes > len(self._bits):
            grown_bytes = max(needed_bytes, 2 * len(self._bits))
            self._bits = np.pad(self._bits, (0, grown_bytes - len(self._bits)))
        np.bitwise_or.at(self._bits, row_indexes >> 3, np.left_shift(1, row_indexes & 7).astype(np.uint8))
        self._length += len(row_indexes)


# The columns that `summarize` reads.
SUMMARIZED = ["row_index", "sample_index", "status", "error_code", "prompt_tokens", "completion_tokens"]


def summarize(completions: pa.RecordBatch | pa.Table) -> tuple[Int64Array, RowCounts]:
    """(input rows [R], counts of their outcomes) of a table in which the samples of one row are neighbours."""
    first_samples = np.flatnonzero(np.asarray(completions.column("sample_index")) == 0)
    if not len(first_samples):
        return np.empty(0, dtype=np.int64), RowCounts()
    status = completions.column("status")
    failed, canceled = (
        np.logical_or.reduceat(np.asarray(pc.equal(status, kind.value)), first_samples)
        for kind in (RowStatus.FAILED, RowStatus.CANCELED)
    )
    num_failed = int(failed.sum())
    num_canceled = int((canceled & ~failed).sum())
    counts = RowCounts(
        len(first_samples) - num_failed - num_canceled,
        num_failed,
        num_canceled,
        _failed_by_code(completions) if num_failed else {},
        int(np.asarray(pc.fill_null(completions.column("prompt_tokens"), 0))[first_samples].sum()),
        pc.sum(completions.column("completion_tokens")).as_py() or 0,
    )
    return np.asarray(completions.column("row_index"))[first_samples], counts


def _failed_by_code(completions: pa.RecordBatch | pa.Table) -> dict[str, int]:
    failed = np.asarray(pc.equal(completions.column("status"), RowStatus.FAILED.value))
    _, firsts = np.unique(np.asarray(completions.column("row_index"))[failed], return_index=True)
    codes = completions.column("error_code").to_pylist()
    return dict(Counter(codes[place] for place in np.flatnonzero(failed)[firsts].tolist()))


def to_ranges(row_indexes: Int64Array) -> list[Range]:
    """The smallest number of ranges that together are the rows, in increasing order."""
    if not len(row_indexes):
        return []
    ordered = np.sort(row_indexes)
    ends = np.flatnonzero(np.diff(ordered) != 1)
    firsts, lasts = ordered[np.append(0, ends + 1)], ordered[np.append(ends, len(ordered) - 1)]
    return list(zip(firsts.tolist(), lasts.tolist(), strict=True))


def from_ranges(ranges: Sequence[Range]) -> Int64Array:
    return np.concatenate([np.empty(0, np.int64), *(np.arange(first, last + 1) for first, last in ranges)])
