"""The rows that a predictor is trained on: prompts as token ids, with the lengths of their completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from batchpipe.errors import InputError
from batchpipe.job.spec import InputSpec
from batchpipe.model.tokenizer import Tokenizer
from batchpipe.read.render import Renderer, needed_columns
from batchpipe.read.source import open_source
from batchpipe.read.tokenize import tokenized
from batchpipe.types import BoolArray, FailedRow, FinishReason, Int32Array, Row
from batchpipe.write.place import COMPLETIONS

_LENGTH_COLUMNS = ("completion_tokens", "out_tok")
_REASON_COLUMN = "finish_reason"


@dataclass(frozen=True)
class Examples:
    """N rows: prompts, numbers of completion tokens [N], and whether each completion ended by itself (False: cut)."""

    prompts: list[Int32Array]
    num_tokens: Int32Array
    ended: BoolArray

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: NDArray[np.int64]) -> Examples:
        return Examples([self.prompts[row] for row in rows.tolist()], self.num_tokens[rows], self.ended[rows])


def read_examples(
    sources: Sequence[Path], tokenizer: Tokenizer, input_spec: InputSpec, *, length_column: str | None = None
) -> Examples:
    """All rows with a length. Prompts are rendered as by a run with `input_spec`, apart from its paths.

    A source is an output folder that carries the columns which prompts are made of, or a JSONL or Parquet file.
    `length_column` None means completion_tokens, or out_tok if that is missing. A row with finish_reason "length"
    was cut; failed rows have no length and are skipped. Raises InputError if a source cannot be read or lacks a
    column, or if no row is usable, and JobError if the chat template does not suit.
    """
    prompts: list[Int32Array] = []
    num_tokens: list[int] = []
    ended: list[bool] = []
    for source in sources:
        for prompt, length, reason in _rows(source, tokenizer, input_spec, length_column):
            prompts.append(prompt)
            num_tokens.append(length)
            ended.append(reason != FinishReason.LENGTH)
    if not prompts:
        raise InputError(f"{', '.join(map(str, sources))}: no row has both a prompt and the length of its completion")
    return Examples(prompts, np.array(num_tokens, np.int32), np.array(ended, np.bool_))


def _rows(
    source: Path, tokenizer: Tokenizer, input_spec: InputSpec, length_column: str | None
) -> Iterator[tuple[Int32Array, int, str | None]]:
    """(prompt, tokens of its completion, finish reason) of every row with a length that a run would not fail."""
    parts = source / COMPLETIONS
    path = str(parts if parts.is_dir() else source)
    spec = input_spec.model_copy(update={"path": (path,), "format": "auto", "id_column": None, "limit": None})
    of_prompt = needed_columns(spec, sampling_column=None)
    available = open_source(spec, carry="all", needed=of_prompt).carried_schema.names
    length_column = length_column or next((name for name in _LENGTH_COLUMNS if name in available), _LENGTH_COLUMNS[0])
    needed = of_prompt | {length_column} | ({_REASON_COLUMN} & set(available))
    rows = open_source(spec, carry="none", needed=needed).rows()
    usable = (row for row in rows if _has_length(row, length_column))
    for row, prompt in tokenized(usable, Renderer(spec, tokenizer)):
        if isinstance(row, Row) and isinstance(prompt, list) and prompt:
            yield np.array(prompt, np.int32), row.values[length_column], row.values.get(_REASON_COLUMN)


def _has_length(row: Row | FailedRow, length_column: str) -> bool:
    value = row.values.get(length_column) if isinstance(row, Row) else None
    return type(value) is int and value >= 1
