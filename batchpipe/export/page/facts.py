"""What the report tells of an output folder, gathered a part at a time: counts and histograms, never all rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from batchpipe.errors import OutputError
from batchpipe.export.parts import Completions, open_completions
from batchpipe.report.metrics import read_metrics
from batchpipe.write.place import STATE, SUCCESS, Place

# Edges of the bins of lengths in tokens: 0, then eight for each doubling, up to a million.
LENGTH_EDGES = np.unique(np.concatenate([[0, 1], np.round(2 ** np.arange(0, 20.01, 0.25)).astype(np.int64)]))
EXAMPLES_PER_CODE = 3
_COLUMNS = ("row_id", "status", "finish_reason", "error_code", "error_message", "prompt_tokens", "completion_tokens")
_MOST_EXAMPLE_CHARACTERS = 400


@dataclass(frozen=True, slots=True)
class Example:
    row_id: str
    message: str


@dataclass
class Facts:
    """Of all committed completions, and of each run. Histograms are by `LENGTH_EDGES`.

    forecast [predicted, drawn]: completions by predicted and by real length; all 0 where nothing was predicted.
    """

    address: str
    is_finished: bool
    runs: Sequence[Mapping[str, Any]]
    num_completions: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    finish_reasons: Counter[str] = field(default_factory=Counter)
    error_codes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    prompt_lengths: NDArray[np.int64] = field(default_factory=lambda: _histogram())
    completion_lengths: NDArray[np.int64] = field(default_factory=lambda: _histogram())
    forecast: NDArray[np.int64] = field(default_factory=lambda: np.zeros((len(_histogram()),) * 2, np.int64))
    predicted_tokens: int = 0
    drawn_tokens: int = 0  # of the completions that have a prediction
    prompt_tokens: int = 0
    completion_tokens: int = 0


def gather(place: Place) -> Facts:
    """Raises OutputError where `place` is no output folder, or a part cannot be read."""
    if place.size_bytes(f"{STATE}/identity.json") is None:
        raise OutputError(f"{place.address}: is no output folder of batchpipe (it has no {STATE}/identity.json).")
    facts = Facts(place.address, place.size_bytes(SUCCESS) is not None, read_metrics(place))
    try:
        completions: Completions | None = open_completions(place)
    except OutputError:
        if place.sizes_bytes("completions"):
            raise
        completions = None  # nothing is committed yet, which the page says
    for part in completions.parts if completions is not None else ():
        try:
            with place.open(part.name) as source, pq.ParquetFile(source) as file:
                names = [*_COLUMNS, "predicted_tokens"]
                for batch in file.iter_batches(columns=names):
                    _take(facts, batch)
        except (OSError, pa.ArrowException) as error:
            raise OutputError(f"{place / part.name}: cannot be read as a part of the completions: {error}") from error
    return facts


def _take(facts: Facts, batch: pa.RecordBatch) -> None:
    facts.num_completions += len(batch)
    for name, counts in (
        ("status", facts.statuses), ("finish_reason", facts.finish_reasons), ("error_code", facts.error_codes),
    ):  # fmt: skip
        for entry in pc.value_counts(batch[name].drop_null()).to_pylist():
            counts[entry["values"]] += entry["counts"]
    facts.prompt_lengths += _histogram(batch["prompt_tokens"].drop_null())
    facts.completion_lengths += _histogram(batch["completion_tokens"].drop_null())
    facts.prompt_tokens += pc.sum(batch["prompt_tokens"]).as_py() or 0
    facts.completion_tokens += pc.sum(batch["completion_tokens"]).as_py() or 0
    both = pc.and_(pc.is_valid(batch["predicted_tokens"]), pc.is_valid(batch["completion_tokens"]))
    predicted, drawn = (np.asarray(batch[name].filter(both)) for name in ("predicted_tokens", "completion_tokens"))
    if len(predicted):
        bins = [np.searchsorted(LENGTH_EDGES, lengths, side="right") - 1 for lengths in (predicted, drawn)]
        np.add.at(facts.forecast, tuple(bins), 1)
        facts.predicted_tokens += int(predicted.sum())
        facts.drawn_tokens += int(drawn.sum())
    _take_examples(facts, batch)


def _take_examples(facts: Facts, batch: pa.RecordBatch) -> None:
    for code in pc.unique(batch["error_code"].drop_null()).to_pylist():
        examples = facts.examples.setdefault(code, [])
        missing = EXAMPLES_PER_CODE - len(examples)
        if missing > 0:
            rows = batch.filter(pc.fill_null(pc.equal(batch["error_code"], code), False)).slice(0, missing)
            for row_id, message in zip(rows["row_id"].to_pylist(), rows["error_message"].to_pylist(), strict=True):
                examples.append(Example(row_id, (message or "")[:_MOST_EXAMPLE_CHARACTERS]))


def _histogram(lengths: pa.Array | None = None) -> NDArray[np.int64]:
    values = np.zeros(0, np.int64) if lengths is None else np.asarray(lengths)
    return np.bincount(np.searchsorted(LENGTH_EDGES, values, side="right") - 1, minlength=len(LENGTH_EDGES))
