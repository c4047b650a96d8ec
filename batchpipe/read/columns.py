"""What the readers of all formats share: a batch of rows as read, and the choice of the input's columns.

Columns are checked before the model loads; the message on a missing one suggests the column that was probably meant.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import pyarrow as pa

from batchpipe.errors import InputError, JobError, RowError
from batchpipe.job.spec import InputSpec
from batchpipe.read.formats.marked_files import MarkedFiles
from batchpipe.read.nested import root_of
from batchpipe.types import ErrorCode

BATCH_ROWS = 1_024
DEFAULT_ID_COLUMN: str = InputSpec.model_fields["id_column"].default

Carry = Literal["all", "none"] | Sequence[str]


@dataclass(frozen=True, slots=True)
class RawBatch:
    """Consecutive rows of one file. `first_row` is the number of the first in its file, from 1.

    `rows[i]` holds the needed values of row i ({} if it could not be parsed), `carried` has its carried columns at
    offset i, and `faults[i]` exists if row i fails here, with the reason. A row with an earlier row's id fails with
    `duplicate_code`.
    """

    file_name: str
    first_row: int
    rows: Sequence[Mapping[str, Any]]
    carried: pa.RecordBatch
    faults: Mapping[int, RowError] = field(default_factory=dict)
    duplicate_code: ErrorCode = ErrorCode.DUPLICATE_ID


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a job takes from its input: the columns `carry` go to the output, prompts and sampling use `needed`."""

    spec: InputSpec
    carry: Carry
    needed: frozenset[str]

    @property
    def names_id_column(self) -> bool:
        """Whether the job itself says which column holds the ids."""
        return "id_column" in self.spec.model_fields_set

    def id_column(self, available: Sequence[str]) -> str | None:
        """The job's id column; None if it has the default name, which an input need not have, and is missing."""
        name = self.spec.id_column
        return None if name == DEFAULT_ID_COLUMN and name not in available else name

    def used(self, id_column: str | None) -> list[str]:
        """The columns of which a row's values are read, in order."""
        return sorted(self.needed if id_column is None else self.needed | {id_column})

    def carried(self, available: Sequence[str]) -> list[str]:
        """Names of the input columns that go to the output; JobError if one is missing."""
        if self.carry == "none":
            return []
        chosen = list(available) if self.carry == "all" else list(dict.fromkeys(self.carry))
        for name in chosen:
            if name not in available:
                raise JobError(f"output.columns: the input has no column {name!r}{_suggest(name, available)}")
        return chosen


class Reader(Protocol):
    """One input of one format, every file of which was checked when the reader was built."""

    carried_schema: pa.Schema
    fingerprint: str
    id_column: str | None  # None: the rows bring no ids

    @property
    def marked(self) -> MarkedFiles | None:
        """The files that are read; None if it is no files that are read."""
        ...

    @property
    def progress(self) -> float:
        """Fraction of the input that `batches` has consumed."""
        ...

    def num_rows(self) -> int | None:
        """The exact number of rows, or None if only reading everything would tell."""
        ...

    def batches(self) -> Iterator[RawBatch]:
        """All rows in order; each call starts again with the first row."""
        ...


def check_present(needed: Sequence[str], available: Sequence[str], where: str) -> None:
    for name in needed:
        if root_of(name, available) not in available:
            raise InputError(f"{where} has no column {name!r}{_suggest(name, available)}")


def _suggest(name: str, available: Sequence[str]) -> str:
    """The end of a message about a missing column."""
    near = difflib.get_close_matches(name, available, n=1)
    listed = ", ".join(sorted(available)[:20]) or "none"
    return (f"; did you mean {near[0]!r}?" if near else "") + f" (columns: {listed})"
