"""What the readers of all formats share: a batch of rows as read, and the checks of the input's columns.

The checks run before the model loads; each says the column, and the one that was probably meant.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import pyarrow as pa

from batchpipe.errors import InputError, JobError, RowError
from batchpipe.job.spec import InputSpec

BATCH_ROWS = 1_024
DEFAULT_ID_COLUMN: str = InputSpec.model_fields["id_column"].default

Carry = Literal["all", "none"] | Sequence[str]


@dataclass(frozen=True, slots=True)
class RawBatch:
    """Consecutive rows of one file. `first_row` is the number of the first in its file, from 1.

    `rows[i]` holds the values needed ({} where the row could not be parsed), `carried` row i of the carried columns,
    `faults[i]`, where there is one, why the row ends here.
    """

    file_name: str
    first_row: int
    rows: Sequence[Mapping[str, Any]]
    carried: pa.RecordBatch
    faults: Mapping[int, RowError] = field(default_factory=dict)


class Reader(Protocol):
    """One format. Opening it has checked every file; `batches` may be called again and starts from the first row."""

    carried_schema: pa.Schema
    fingerprint: str
    id_column: str | None  # None: the rows bring no ids

    @property
    def progress(self) -> float:
        """Fraction of the input that `batches` has consumed."""
        ...

    def num_rows(self) -> int | None:
        """Exact, or None where only reading everything would tell."""
        ...

    def batches(self) -> Iterator[RawBatch]: ...


def choose_id_column(spec: InputSpec, available: Sequence[str]) -> str | None:
    """The default id column is only used where the input has it; one that was asked for must be there."""
    if spec.id_column == DEFAULT_ID_COLUMN and spec.id_column not in available:
        return None
    return spec.id_column


def choose_carried(carry: Carry, available: Sequence[str]) -> list[str]:
    """Names of the input columns that go to the output; JobError where one is not there."""
    if carry == "none":
        return []
    chosen = list(available) if carry == "all" else list(dict.fromkeys(carry))
    for name in chosen:
        if name not in available:
            raise JobError(f"output.columns: the input has no column {name!r}{suggest(name, available)}")
    return chosen


def check_present(needed: Sequence[str], available: Sequence[str], where: str) -> None:
    for name in needed:
        if name not in available:
            raise InputError(f"{where} has no column {name!r}{suggest(name, available)}")


def suggest(name: str, available: Sequence[str]) -> str:
    """A tail for a message about a missing column."""
    near = difflib.get_close_matches(name, available, n=1)
    listed = ", ".join(sorted(available)[:20]) or "none"
    return (f"; did you mean {near[0]!r}?" if near else "") + f" (columns: {listed})"


def check_arrow_columns(schema: pa.Schema, spec: InputSpec, id_column: str | None, where: str) -> None:
    """InputError where a column has a type that no row of it could be used with."""
    duplicates = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if duplicates:
        raise InputError(f"{where} has more than one column {duplicates[0]!r}")
    roles = [("input.id_column", id_column, _can_be_id, "text or whole numbers")]
    if spec.messages_column is not None:
        wanted = "a list of {role, content}"
        roles.append(("input.messages_column", spec.messages_column, _can_be_messages, wanted))
    elif spec.template is None:
        wanted = "text or a list of token ids"
        roles.append(("input.prompt_column", spec.prompt_column, _can_be_prompt, wanted))
    for key, name, accepts, wanted in roles:
        if name is not None and name in schema.names:
            arrow_type = schema.field(name).type
            if not (accepts(arrow_type) or pa.types.is_null(arrow_type)):
                raise InputError(f"{key}: column {name!r} of {where} is {arrow_type}; it must be {wanted}")


def _is_text(arrow_type: pa.DataType) -> bool:
    if pa.types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    types = pa.types
    return bool(types.is_string(arrow_type) or types.is_large_string(arrow_type) or types.is_string_view(arrow_type))


def _is_list(arrow_type: pa.DataType) -> bool:
    types = pa.types
    kinds = (
        types.is_list,
        types.is_large_list,
        types.is_fixed_size_list,
        types.is_list_view,
        types.is_large_list_view,
    )
    return any(is_kind(arrow_type) for is_kind in kinds)


def _can_be_id(arrow_type: pa.DataType) -> bool:
    return _is_text(arrow_type) or bool(pa.types.is_integer(arrow_type))


def _can_be_prompt(arrow_type: pa.DataType) -> bool:
    is_token_list = _is_list(arrow_type) and bool(pa.types.is_integer(arrow_type.value_type))
    return _is_text(arrow_type) or is_token_list


def _can_be_messages(arrow_type: pa.DataType) -> bool:
    return _is_list(arrow_type) and bool(pa.types.is_struct(arrow_type.value_type))
