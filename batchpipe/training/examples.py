"""What a predictor learns from: prompts as token ids, with the lengths of their completions."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchpipe.errors import InputError, RowError
from batchpipe.job.spec import InputSpec
from batchpipe.model.tokenizer import Tokenizer
from batchpipe.read.render import Renderer, needed_columns
from batchpipe.read.source import open_source
from batchpipe.read.tokenize import BATCH_ROWS
from batchpipe.types import BoolArray, FinishReason, Int32Array, Row
from batchpipe.write.folder import COMPLETIONS

_LENGTH_COLUMNS = ("completion_tokens", "out_tok")
_REASON_COLUMN = "finish_reason"


@dataclass(frozen=True)
class Examples:
    """N rows: prompts, tokens of their completions, and whether these ended by themselves (False: cut)."""

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
    """All rows with a length, each prompt rendered as a run with `input_spec` would, whose paths are not looked at.

    A source is an output folder that carried the columns prompts are made of, or a JSONL or Parquet file.
    `length_column` None takes completion_tokens, or out_tok where that is missing. Rows whose finish_reason is "length"
    were cut; rows that failed have no length and are passed over. Raises InputError where a source cannot be read,
    lacks a column or none has a row to learn from, and JobError where the chat template does not suit.
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
    """Prompt, tokens of its completion and finish reason, of every row that has them."""
    parts = source / COMPLETIONS
    path = str(parts if parts.is_dir() else source)
    spec = input_spec.model_copy(update={"path": (path,), "format": "auto", "id_column": None, "limit": None})
    # Messages of a JSONL input stand in the output as JSON text, which would be refused as messages: no role is named.
    columns = (
        spec if spec.messages_column is None else spec.model_copy(update={"messages_column": None, "template": ""})
    )
    of_prompt = needed_columns(spec, sampling_column=None)
    available = open_source(columns, carry="all", needed=of_prompt).carried_schema.names
    length_column = length_column or next((name for name in _LENGTH_COLUMNS if name in available), _LENGTH_COLUMNS[0])
    needed = of_prompt | {length_column} | ({_REASON_COLUMN} & set(available))
    rows = open_source(columns, carry="none", needed=needed).rows()
    renderer = Renderer(spec, tokenizer)
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        usable = [
            (prompt, row.values)
            for row in batch
            if isinstance(row, Row)
            and _is_length(row.values.get(length_column))
            and (prompt := _rendered(row.values, renderer, spec.messages_column)) is not None
        ]
        encoded = iter(renderer.encode([prompt for prompt, _ in usable if isinstance(prompt, str)]))
        for prompt, values in usable:
            token_ids = next(encoded) if isinstance(prompt, str) else prompt
            if token_ids:
                yield np.array(token_ids, np.int32), values[length_column], values.get(_REASON_COLUMN)


def _is_length(value: Any) -> bool:
    return type(value) is int and value >= 1


def _rendered(values: Mapping[str, Any], renderer: Renderer, messages_column: str | None) -> str | list[int] | None:
    """The prompt as a run would have it, None where a run would have failed the row."""
    try:
        if messages_column is not None and isinstance(values[messages_column], str):
            values = {**values, messages_column: json.loads(values[messages_column])}
        return renderer.render(values)
    except (RowError, json.JSONDecodeError):
        return None
