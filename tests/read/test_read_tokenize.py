"""Requests: prompts that fit, settings of their row, and every row in its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batchpipe.errors import JobError
from batchpipe.job import Sampling
from batchpipe.job.spec import InputSpec
from batchpipe.model.tokenizer import Tokenizer, load_tokenizer
from batchpipe.read.render import Renderer
from batchpipe.read.tokenize import BATCH_ROWS, requests
from batchpipe.types import Carried, ErrorCode, FailedRow, Request, Row, RowKey
from tests.tiny_tokenizer import build_tiny_tokenizer

VOCABULARY = 320
CONTEXT = 16


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def key_of(index: int) -> RowKey:
    return RowKey(index, f"r{index}", Carried(pa.RecordBatch.from_pylist([{"a": 1}]), 0))


def made(tokenizer: Tokenizer, rows: list[Any], **sampling: Any) -> list[Request | FailedRow]:
    """Requests of rows given as values, or as FailedRow."""
    read = (row if isinstance(row, FailedRow) else Row(key_of(index), row) for index, row in enumerate(rows))
    renderer = Renderer(InputSpec.model_validate({"path": "x", "chat_template": "none"}), tokenizer)
    settings = Sampling.model_validate({"max_tokens": 8, **sampling})
    return list(requests(read, renderer, settings, max_context_tokens=CONTEXT, vocabulary_size=VOCABULARY))


def one(tokenizer: Tokenizer, values: dict[str, Any], **sampling: Any) -> Request | FailedRow:
    (result,) = made(tokenizer, [values], **sampling)
    return result


def test_order_and_tokens(tokenizer: Tokenizer) -> None:
    texts = [f"row {n}" for n in range(2 * BATCH_ROWS + 3)]
    rows: list[Any] = [{"prompt": text} for text in texts]
    rows[5] = {"prompt": None}
    rows[7] = {"prompt": [9, 8, 7]}
    results = made(tokenizer, rows)
    assert [result.key.index for result in results] == list(range(len(rows)))
    expected = tokenizer.encode_batch(texts, add_special_tokens=True)
    expected[7] = [9, 8, 7]
    for index, result in enumerate(results):
        if index == 5:
            assert isinstance(result, FailedRow)
            assert result.code == ErrorCode.MISSING_PROMPT
        else:
            assert isinstance(result, Request)
            assert result.prompt_token_ids.dtype == "int32"
            assert result.prompt_token_ids.tolist() == expected[index]


@pytest.mark.parametrize(("length", "left"), [(1, 8), (CONTEXT - 8, 8), (CONTEXT - 7, 7), (CONTEXT - 1, 1)])
def test_max_tokens_is_cut_to_what_the_context_leaves(tokenizer: Tokenizer, length: int, left: int) -> None:
    request = one(tokenizer, {"prompt": [5] * length})
    assert isinstance(request, Request)
    assert request.sampling.max_tokens == left


@pytest.mark.parametrize("length", [CONTEXT, CONTEXT + 1, 10_000])
def test_a_prompt_that_leaves_no_room_is_too_long(tokenizer: Tokenizer, length: int) -> None:
    failed = one(tokenizer, {"prompt": [5] * length})
    assert isinstance(failed, FailedRow)
    assert failed.code == ErrorCode.PROMPT_TOO_LONG
    assert f"has {length:,} tokens; the model's context of 16 leaves room for at most 15" in failed.message


@pytest.mark.parametrize("token_id", [-1, VOCABULARY, 2**40])
def test_token_ids_outside_the_vocabulary(tokenizer: Tokenizer, token_id: int) -> None:
    failed = one(tokenizer, {"prompt": [5, token_id]})
    assert isinstance(failed, FailedRow)
    assert failed.code == ErrorCode.INVALID_TOKEN
    assert failed.message == f"token id {token_id} of the prompt is outside the vocabulary of 320"


def test_a_text_without_tokens_is_empty(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts, add_special_tokens: [[] for _ in texts])
    failed = one(tokenizer, {"prompt": " "})
    assert isinstance(failed, FailedRow)
    assert (failed.code, failed.message) == (ErrorCode.EMPTY_PROMPT, "the prompt has no tokens")


@pytest.mark.parametrize("as_text", [False, True])
def test_a_row_overrides_the_settings_of_the_job(tokenizer: Tokenizer, as_text: bool) -> None:
    given: Any = {"temperature": 0.5, "n": 2, "max_tokens": None}
    values = {"prompt": "x", "s": json.dumps(given) if as_text else given}
    request, plain = made(tokenizer, [values, {"prompt": "x", "s": None}], column="s", top_k=3)
    assert isinstance(request, Request) and isinstance(plain, Request)
    sampling = request.sampling
    assert (sampling.temperature, sampling.n, sampling.top_k, sampling.max_tokens) == (0.5, 2, 3, 8)
    assert (plain.sampling.temperature, plain.sampling.n) == (0.0, 1)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("{", "column 's' is not valid JSON"),
        ("[1]", "column 's' holds a list, not an object"),
        (3, "column 's' holds a int, not an object"),
        ({"temperatur": 1}, "did you mean 'temperature'"),
        ({"temperature": -1}, "temperature"),
        ({"logit_bias": {"320": 1.0}}, "logit_bias: token id 320 is outside the vocabulary of 320"),
        ({"stop_token_ids": [999]}, "stop_token_ids: token id 999 is outside"),
        ({"stop_token_ids": [3, VOCABULARY]}, "stop_token_ids: token id 320 is outside"),
    ],
)
def test_bad_settings_fail_their_row(tokenizer: Tokenizer, given: Any, words: str) -> None:
    failed, good = made(tokenizer, [{"prompt": "x", "s": given}, {"prompt": "x"}], column="s")
    assert isinstance(failed, FailedRow)
    assert failed.code == ErrorCode.INVALID_SAMPLING
    assert words in failed.message
    assert isinstance(good, Request)


def test_every_token_of_the_vocabulary_may_be_named(tokenizer: Tokenizer) -> None:
    given = {"stop_token_ids": [0, VOCABULARY - 1], "logit_bias": {"0": 1.0, str(VOCABULARY - 1): -1.0}}
    request = one(tokenizer, {"prompt": "x", "s": given}, column="s")
    assert isinstance(request, Request)
    assert request.sampling.stop_token_ids == (0, VOCABULARY - 1)
    assert request.sampling.logit_bias == {0: 1.0, VOCABULARY - 1: -1.0}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stop_token_ids": [VOCABULARY]}, "sampling.stop_token_ids: token id 320 is outside the vocabulary"),
        ({"logit_bias": {5_000: 1.0}}, "sampling.logit_bias: token id 5000 is outside the vocabulary"),
    ],
)
def test_bad_settings_of_the_job_end_it(tokenizer: Tokenizer, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError, match=words):
        made(tokenizer, [{"prompt": "x"}], **settings)


def test_a_failed_row_counts_for_all_its_samples(tokenizer: Tokenizer) -> None:
    unread = FailedRow(key_of(0), ErrorCode.INVALID_JSON, "why")
    rows = [unread, {"prompt": None}, {"prompt": None, "s": {"n": 5}}, {"prompt": "x", "s": "{"}]
    results = made(tokenizer, rows, n=3, column="s")
    assert [result.num_samples for result in results if isinstance(result, FailedRow)] == [3, 3, 5, 3]
    assert results[0] == FailedRow(unread.key, ErrorCode.INVALID_JSON, "why", 3)


def test_rows_come_as_they_are_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    taken = 0

    def endless() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield Row(key_of(taken - 1), {"prompt": "x"})

    renderer = Renderer(InputSpec(path=("x",)), tokenizer)
    stream = requests(endless(), renderer, Sampling(), max_context_tokens=99, vocabulary_size=VOCABULARY)
    next(stream)
    assert taken == BATCH_ROWS
