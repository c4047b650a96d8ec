"""What Parquet files and `datasets` share: both bring Arrow batches with a schema that is known beforehand."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import types

from batchpipe.errors import InputError, RowError
from batchpipe.job.spec import InputSpec
from batchpipe.read.columns import RawBatch, Wanted, check_present
from batchpipe.read.formats.promote import cast_batch
from batchpipe.read.nested import root_of, type_at
from batchpipe.read.nulls import without_nulls
from batchpipe.types import ErrorCode

logger = logging.getLogger(__name__)

_TEXTS = (types.is_string, types.is_large_string, types.is_string_view)
_LISTS = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)


@dataclass(frozen=True, slots=True)
class ArrowColumns:
    """The columns of an Arrow input that are used: the ids', those that prompts need, those carried to the output."""

    id_column: str | None
    needed: list[str]  # sorted, the id column included
    carried_schema: pa.Schema

    @classmethod
    def choose(cls, schema: pa.Schema, wanted: Wanted, where: str) -> ArrowColumns:
        """Raises InputError or JobError, naming the input `where`, if a column is missing or has an unusable type."""
        id_column = wanted.id_column(schema.names)
        if id_column is not None and not wanted.names_id_column and not _can_be_id(schema.field(id_column).type):
            kind = schema.field(id_column).type
            logger.warning("input.id_column: column 'id' is %s, so ids are '<file name>:<row number>'", kind)
            id_column = None
        used = wanted.used(id_column)
        check_once(schema, where)
        check_present(used, schema.names, where)
        for name in used:
            if type_at(schema, name) is None:
                kind = schema.field(root_of(name, schema.names)).type
                raise InputError(f"{where} has no field {name!r}; its column is {kind}")
        _check_types(schema, wanted.spec, id_column, where)
        carried = [schema.field(name) for name in wanted.carried(schema.names)]
        return cls(id_column, sorted({root_of(name, schema.names) for name in used}), pa.schema(carried))

    def raw_batch(self, batch: pa.RecordBatch, file_name: str, first_row: int) -> RawBatch:
        """Splits `batch` into the needed values, as Python objects, and the carried columns."""
        used = batch.select(self.needed)
        rows, faults = _python_rows(used)
        for name in (field.name for field in used.schema if _has_fields(field.type)):
            for row in filter(None, rows):  # a row that cannot be read is empty
                row[name] = without_nulls(row[name])
        return RawBatch(file_name, first_row, rows, cast_batch(batch, self.carried_schema), faults)


def check_once(schema: pa.Schema, where: str) -> None:
    """Raises InputError if two columns share a name."""
    if duplicates := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise InputError(f"{where} has more than one column {duplicates[0]!r}")


def _python_rows(batch: pa.RecordBatch) -> tuple[list[dict[str, Any]], dict[int, RowError]]:
    try:
        return batch.to_pylist(), {}
    except ValueError:  # Python cannot hold a value, such as text that is not UTF-8: find its row
        rows: list[dict[str, Any]] = []
        faults: dict[int, RowError] = {}
        for offset in range(batch.num_rows):
            try:
                rows += batch.slice(offset, 1).to_pylist()
            except ValueError as error:
                is_text = isinstance(error, UnicodeDecodeError)
                code = ErrorCode.INVALID_UTF8 if is_text else ErrorCode.WRONG_TYPE
                reason = "text that is not valid UTF-8" if is_text else str(error)
                faults[offset] = RowError(code, f"a value of the row cannot be read: {reason}")
                rows.append({})
        return rows, faults


def _check_types(schema: pa.Schema, spec: InputSpec, id_column: str | None, where: str) -> None:
    """Raises InputError if a column has a type that no row of it could be used with."""
    roles = {"id_column": id_column}
    if spec.messages_column is not None:
        roles["messages_column"] = spec.messages_column
    elif spec.template is None:
        roles["prompt_column"] = spec.prompt_column
    for key, name in roles.items():
        if name is None or root_of(name, schema.names) not in schema.names:
            continue
        arrow_type = type_at(schema, name)
        accepts, wanted = _ACCEPTED[key]
        if not (accepts(arrow_type) or types.is_null(arrow_type)):
            hint = f"; write {_as_prompt(name, arrow_type)} under `input`" if key == "prompt_column" else ""
            raise InputError(f"input.{key}: column {name!r} of {where} is {arrow_type}; it must be {wanted}{hint}")


def _as_prompt(name: str, arrow_type: pa.DataType) -> str:
    """The line of a job that takes a column for prompts which is no text."""
    if not _is_list_of(arrow_type, types.is_struct):
        return f'`template: "{{{name}}}"` for its values as text'
    return f"`messages_column: {name}`"


def _is_text(arrow_type: pa.DataType) -> bool:
    if types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    return any(is_kind(arrow_type) for is_kind in _TEXTS)


def _is_list_of(arrow_type: pa.DataType, is_item: Callable[[pa.DataType], bool]) -> bool:
    return any(is_kind(arrow_type) for is_kind in _LISTS) and is_item(arrow_type.value_type)


def _can_be_id(kind: pa.DataType) -> bool:
    return _is_text(kind) or types.is_integer(kind) or types.is_floating(kind)


def _has_fields(arrow_type: pa.DataType) -> bool:
    """Whether structs or maps stand in a column at any depth."""
    if any(is_kind(arrow_type) for is_kind in _LISTS):
        return _has_fields(arrow_type.value_type)
    return bool(types.is_struct(arrow_type) or types.is_map(arrow_type))


def _is_conversation(kind: pa.DataType) -> bool:
    is_struct_of_lists = types.is_struct(kind) and all(_is_list_of(field.type, lambda _: True) for field in kind)
    is_list = _is_list_of(kind, lambda item: types.is_struct(item) or types.is_map(item))
    return is_list or is_struct_of_lists or _is_text(kind)


_ACCEPTED: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "id_column": (_can_be_id, "text or whole numbers"),
    "messages_column": (_is_conversation, "a list of {role, content}, or that as JSON text"),
    "prompt_column": (
        lambda kind: _is_text(kind) or _is_list_of(kind, types.is_integer),
        "text or a list of token ids",
    ),
}
