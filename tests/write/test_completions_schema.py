import datetime

import pyarrow as pa
import pytest

from batchpipe.errors import JobError
from batchpipe.types import Carried, Outcome, RowKey, RowStatus, TokenLogprobs
from batchpipe.write.schema import RESERVED_COLUMNS, check_no_clash, completions_schema, to_batch
from tests.write.completion_cases import CARRIED, SCHEMA, outcomes_of, sample


def test_columns_of_the_contract_come_first_with_fixed_types() -> None:
    assert [(field.name, str(field.type)) for field in SCHEMA] == [
        ("row_id", "string"),
        ("row_index", "int64"),
        ("sample_index", "int32"),
        ("status", "string"),
        ("completion", "string"),
        ("finish_reason", "string"),
        ("error_code", "string"),
        ("error_message", "string"),
        ("prompt_tokens", "int32"),
        ("completion_tokens", "int32"),
        ("predicted_tokens", "int32"),
        ("topic", "string"),
        ("score", "double"),
    ]


@pytest.mark.parametrize("name", sorted(RESERVED_COLUMNS))
def test_a_clash_names_the_column(name: str) -> None:
    with pytest.raises(JobError, match=f"'{name}' has the name of a column of the completions"):
        check_no_clash(pa.schema([(name, pa.string())]))


def test_two_columns_of_one_name_are_refused() -> None:
    with pytest.raises(JobError, match="more than one column 'a'"):
        completions_schema(pa.schema([("a", pa.int8()), ("a", pa.int8())]), with_logprobs=False)


def test_a_type_that_parquet_lacks_is_found_before_the_first_part() -> None:
    with pytest.raises(JobError, match="'span' has the type month_day_nano_interval, which Parquet cannot hold"):
        completions_schema(pa.schema([("span", pa.month_day_nano_interval())]), with_logprobs=False)


def test_a_batch_holds_what_the_outcomes_say() -> None:
    rows = to_batch(outcomes_of([7, 8]), SCHEMA).to_pylist()
    assert rows[0] == {
        "row_id": "row 7",
        "row_index": 7,
        "sample_index": 0,
        "status": "failed",
        "completion": None,
        "finish_reason": None,
        "error_code": "empty_prompt",
        "error_message": "the prompt is empty",
        "prompt_tokens": 5,
        "completion_tokens": None,
        "predicted_tokens": None,
        "topic": "topic 7",
        "score": 3.5,
    }
    assert (rows[1]["status"], rows[1]["completion"], rows[1]["finish_reason"]) == ("succeeded", "forty-two", "stop")


def test_samples_of_a_row_stand_together_whatever_batches_rows_were_read_in() -> None:
    first, second = outcomes_of([0, 1, 2], num_samples=2), outcomes_of([3, 4, 5], num_samples=2)
    mixed = [first[0], second[2], first[2], second[0]]
    rows = to_batch(mixed, SCHEMA).to_pylist()
    assert [(row["row_index"], row["sample_index"], row["topic"]) for row in rows] == [
        (index, sample_index, f"topic {index}") for index in (0, 2, 5, 3) for sample_index in (0, 1)
    ]


def test_carried_columns_keep_exact_types_across_batches() -> None:
    values = {
        "words": pa.array(["a", "b"]).dictionary_encode(),
        "view": pa.array(["x", None], pa.string_view()),
        "large": pa.array(["p", "q"], pa.large_string()),
        "when": pa.array([datetime.datetime(2024, 5, 1)] * 2, pa.timestamp("ns", "Europe/Vienna")),
        "nested": pa.array([[{"k": 1}], None], pa.list_(pa.struct([("k", pa.int8())]))),
        "price": pa.array(["1.5", "2.5"]).cast(pa.decimal128(9, 2)),
    }
    batches = [pa.RecordBatch.from_pydict(values)] * 2
    other = {**values, "words": pa.array(["b", "c"]).dictionary_encode()}
    batches[1] = pa.RecordBatch.from_pydict(other)
    schema = completions_schema(batches[0].schema, with_logprobs=False)
    outcomes = [
        Outcome(RowKey(2 * k + i, f"{k}{i}", Carried(batch, i)), 1, None, (sample(),))
        for k, batch in enumerate(batches)
        for i in range(2)
    ]
    found = to_batch(outcomes, schema)
    assert found.schema.equals(schema)
    assert found.select(list(values)).to_pylist() == batches[0].to_pylist() + batches[1].to_pylist()


def test_without_carried_columns_only_ours_remain() -> None:
    empty = pa.RecordBatch.from_arrays([], schema=pa.schema([]))
    schema = completions_schema(empty.schema, with_logprobs=False)
    batch = to_batch([Outcome(RowKey(0, "a", Carried(empty, 0)), 1, 9, (sample(),))], schema)
    assert batch.num_rows == 1 and batch.column("predicted_tokens").to_pylist() == [9]


def test_logprobs_are_a_list_a_completion() -> None:
    tokens = (TokenLogprobs(5, -0.5, (5, 6), (-0.5, -1.5)), TokenLogprobs(7, -2.0, (7,), (-2.0,)))
    outcomes = outcomes_of([1, 2])
    outcomes[1] = Outcome(outcomes[1].key, 5, None, (sample(logprobs=tokens), sample(RowStatus.FAILED)))
    schema = completions_schema(CARRIED, with_logprobs=True)
    column = to_batch(outcomes, schema).column("logprobs")
    assert column.to_pylist() == [
        [],
        [
            {"token_id": 5, "logprob": -0.5, "top_ids": [5, 6], "top_logprobs": [-0.5, -1.5]},
            {"token_id": 7, "logprob": -2.0, "top_ids": [7], "top_logprobs": [-2.0]},
        ],
        [],
    ]
