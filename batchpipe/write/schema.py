"""The completions table: its columns, and the conversion of outcomes to an Arrow batch with these columns."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchpipe.errors import JobError
from batchpipe.types import Outcome, SampleOutcome

SCHEMA_VERSION = 1

_OWN_FIELDS = (
    pa.field("row_id", pa.string()),
    pa.field("row_index", pa.int64()),
    pa.field("sample_index", pa.int32()),
    pa.field("status", pa.string()),
    pa.field("completion", pa.string()),
    pa.field("finish_reason", pa.string()),
    pa.field("error_code", pa.string()),
    pa.field("error_message", pa.string()),
    pa.field("prompt_tokens", pa.int32()),
    pa.field("completion_tokens", pa.int32()),
    pa.field("predicted_tokens", pa.int32()),
)
_TOKEN_LOGPROBS = pa.struct(
    [
        ("token_id", pa.int32()),
        ("logprob", pa.float32()),
        ("top_ids", pa.list_(pa.int32())),
        ("top_logprobs", pa.list_(pa.float32())),
    ]
)
_LOGPROBS_FIELD = pa.field("logprobs", pa.list_(_TOKEN_LOGPROBS))

# Marked as ours, since an input may have a column of this name that is carried where the job asks for no reasoning.
_REASONING_FIELD = pa.field("reasoning", pa.string(), metadata={"batchpipe": "reasoning"})

RESERVED_COLUMNS = frozenset(field.name for field in (*_OWN_FIELDS, _LOGPROBS_FIELD))


def completions_schema(
    carried: pa.Schema, with_logprobs: bool, *, with_reasoning: bool = False, prefix: str | None = None
) -> pa.Schema:
    """The schema of every part: our columns, then the carried ones with their exact types.

    `prefix` is put before a carried name that is one of ours. Raises JobError if a carried column has a name of ours or
    a type that Parquet lacks.
    """
    reserved = RESERVED_COLUMNS | ({_REASONING_FIELD.name} if with_reasoning else frozenset())
    carried = pa.schema([_carried_field(field, reserved, prefix) for field in carried])
    check_no_clash(carried, reserved)
    for field in carried:
        _check_storable(field)
    optional = [*([_LOGPROBS_FIELD] if with_logprobs else []), *([_REASONING_FIELD] if with_reasoning else [])]
    return pa.schema([*_OWN_FIELDS, *optional, *carried])


def check_no_clash(carried: pa.Schema, reserved: frozenset[str] = RESERVED_COLUMNS) -> None:
    """Raises JobError if a carried column has the name of one of ours, or two carried columns share a name."""
    for name in carried.names:
        if name in reserved:
            raise JobError(
                f"output.columns: the input column {name!r} has the name of a column of the completions; write "
                f"`prefix: input_` under `output` to carry it as 'input_{name}', or list the columns to carry in "
                "output.columns without it."
            )
        if carried.names.count(name) > 1:
            raise JobError(
                f"output.columns: more than one column {name!r} would be carried; rename one of them in the input, or "
                "choose another output.prefix if that made the name."
            )


def _carried_field(field: pa.Field, reserved: frozenset[str], prefix: str | None) -> pa.Field:
    if b"batchpipe" in (field.metadata or {}):
        field = field.remove_metadata()  # the mark of a column of ours, of the run whose output this input is
    return field.with_name(prefix + field.name) if prefix is not None and field.name in reserved else field


def _check_storable(field: pa.Field) -> None:
    """Writes an empty Parquet file, so that a type which Parquet lacks is found before the model is loaded."""
    try:
        pq.ParquetWriter(pa.BufferOutputStream(), pa.schema([field])).close()
    except pa.ArrowNotImplementedError as error:
        raise JobError(
            f"output.columns: the input column {field.name!r} has the type {field.type}, which Parquet cannot hold; "
            "leave it out of output.columns."
        ) from error


def to_batch(outcomes: Sequence[Outcome], schema: pa.Schema) -> pa.RecordBatch:
    """One row per sample of `outcomes` (at least one), the samples of an outcome as neighbours.

    Outcomes are grouped by the Arrow batch of their carried columns, because Arrow takes rows of one batch at a time.
    """
    groups: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(id(outcome.key.carried.batch), []).append(outcome)
    in_order = [outcome for group in groups.values() for outcome in group]
    arrays = _own_columns(in_order, with_logprobs=_LOGPROBS_FIELD.name in schema.names)
    if any(field.metadata == _REASONING_FIELD.metadata for field in schema):
        arrays.append(pa.array([sample.reasoning for one in in_order for sample in one.samples], pa.string()))
    num_own = len(arrays)
    if len(schema) > num_own:
        taken = [_take_carried(group) for group in groups.values()]
        carried = taken[0] if len(taken) == 1 else pa.concat_batches(taken)
        names = zip(schema.names[num_own:], carried.schema.names, strict=True)
        assert all(name.endswith(given) for name, given in names), "carried columns differ from the schema's"
        arrays += carried.columns
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _own_columns(outcomes: list[Outcome], with_logprobs: bool) -> list[pa.Array]:
    owners = [outcome for outcome in outcomes for _ in outcome.samples]
    samples = [sample for outcome in outcomes for sample in outcome.samples]
    columns: list[list[Any]] = [
        [owner.key.row_id for owner in owners],
        [owner.key.index for owner in owners],
        [index for outcome in outcomes for index in range(len(outcome.samples))],
        [sample.status for sample in samples],
        [sample.completion for sample in samples],
        [sample.finish_reason for sample in samples],
        [sample.error_code for sample in samples],
        [sample.error_message for sample in samples],
        [owner.prompt_tokens for owner in owners],
        [sample.completion_tokens for sample in samples],
        [owner.predicted_tokens for owner in owners],
    ]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, _OWN_FIELDS, strict=True)]
    if with_logprobs:
        arrays.append(_logprobs_column(samples))
    return arrays


def _logprobs_column(samples: list[SampleOutcome]) -> pa.Array:
    offsets = list(itertools.accumulate((len(sample.logprobs) for sample in samples), initial=0))
    tokens = [token for sample in samples for token in sample.logprobs]
    fields = list(_TOKEN_LOGPROBS)
    arrays = [pa.array([getattr(token, field.name) for token in tokens], field.type) for field in fields]
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.StructArray.from_arrays(arrays, fields=fields))


def _take_carried(outcomes: list[Outcome]) -> pa.RecordBatch:
    """The carried values of outcomes of one Arrow batch, a row per sample; a copy, so that the batch can be freed."""
    offsets = [outcome.key.carried.offset for outcome in outcomes for _ in outcome.samples]
    batch = outcomes[0].key.carried.batch
    try:
        return batch.take(pa.array(offsets, pa.int64()))
    except pa.ArrowNotImplementedError:  # of string_view, of which Arrow can only join slices
        return pa.concat_batches([batch.slice(offset, 1) for offset in offsets])
