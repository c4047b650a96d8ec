"""One schema for the files of an input, which may store a column in several ways.

pandas writes `string` where Polars writes `large_string`, a column without values is `null`, a writer may or may not
say that an inner field is never null, and whole numbers with gaps are doubles: these are one type in two forms.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

import pyarrow as pa
from pyarrow import types

from batchpipe.errors import InputError
from batchpipe.read.files import InputFile

logger = logging.getLogger(__name__)


def promoted_schema(schemas: Sequence[pa.Schema], paths: Sequence[str]) -> pa.Schema:
    """The columns of the first of `schemas`, each of a type to which those of its other forms can be cast.

    One line of the log names the columns that have several types. Raises InputError if two types of a column have
    nothing in common; `paths` name the files in messages.
    """
    fields, changed = [], []
    for field in schemas[0]:
        found = {
            schema.field(field.name).type: path
            for schema, path in zip(schemas, paths, strict=True)
            if field.name in schema.names
        }
        promoted = _common_type(field.name, found)
        fields.append(pa.field(field.name, promoted))
        if len(found) > 1:
            changed.append(f"{field.name!r} ({', '.join(map(str, found))}) as {promoted}")
    if changed:
        logger.warning("input.path: columns differ in type between files and are read as one: %s", "; ".join(changed))
    return pa.schema(fields)


def cast_batch(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """The columns of `schema` with its types; whole numbers that a double cannot hold exactly are rounded."""
    chosen = batch.select(schema.names)
    try:
        return chosen.cast(schema)
    except pa.ArrowInvalid:
        return chosen.cast(schema, safe=False)


def check_same_columns(
    file: InputFile, available: Collection[str], used: Collection[str], exactly: bool, first: InputFile
) -> None:
    """Raises InputError unless `file` has the columns `used`, and with `exactly` no others."""
    missing = set(used) - set(available)
    extra = set(available) - set(used) if exactly else set()
    if missing or extra:
        name = sorted(missing | extra)[0]
        lacking, having = (file, first) if name in missing else (first, file)
        raise InputError(f"input.path: column {name!r} is in {having.path}, but not in {lacking.path}")


def _common_type(name: str, found: dict[pa.DataType, str]) -> pa.DataType:
    if len(found) == 1:
        return next(iter(found))
    for kinds in (found, map(_plain, found)):
        try:
            columns = [pa.schema([(name, kind)]) for kind in kinds]
            return pa.unify_schemas(columns, promote_options="permissive").field(name).type
        except pa.ArrowTypeError:
            continue
    (first, first_path), *others = found.items()
    other, path = others[-1]
    raise InputError(f"input.path: column {name!r} is {other} in {path}, but {first} in {first_path}")


def _plain(arrow_type: pa.DataType) -> pa.DataType:
    """The type without the ways of storing that Arrow does not unify: dictionaries and views."""
    if types.is_dictionary(arrow_type):
        return _plain(arrow_type.value_type)
    if types.is_string_view(arrow_type):
        return pa.large_string()
    return pa.large_binary() if types.is_binary_view(arrow_type) else arrow_type
