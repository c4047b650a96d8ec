"""OpenAI batch files: JSON Lines, each a request {custom_id, method, url, body}; both urls may stand in one file.

The requests of one input name one model, that of most of its first lines; the job's model answers them whatever its
name. Every column is carried as text, the body as JSON; `url` always, since it says what an answer looks like.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import orjson
import pyarrow as pa

from batchpipe.errors import InputError, RowError
from batchpipe.job.explain import shown
from batchpipe.job.spec import InputSpec
from batchpipe.read.columns import RawBatch, Wanted
from batchpipe.read.files import InputFile, file_names
from batchpipe.read.formats.json_lines import line_rows, parse_lines
from batchpipe.read.formats.line_file import open_lines
from batchpipe.read.formats.text_rows import SAMPLE_ROWS, TextReader
from batchpipe.read.openai_body import CHAT_URL, COMPLETIONS_URL, row_values
from batchpipe.types import ErrorCode

ID, METHOD, URL, BODY = "custom_id", "method", "url", "body"
_INVALID_LINES = {ErrorCode.INVALID_UTF8, ErrorCode.INVALID_JSON, ErrorCode.NOT_AN_OBJECT}


def holds_requests(files: Sequence[InputFile], spec: InputSpec) -> bool:
    """Whether JSONL files are certainly OpenAI's: most of the first lines are requests, and no key says otherwise."""
    if spec.keys_against_requests:
        return False
    with open_lines(files[0]) as lines:
        block = next(lines.blocks(spec.max_line_bytes), [])
    rows, faults = parse_lines(block, 1, files[0].path, ())
    return 2 * sum(map(_is_request, rows)) > len(rows) - len(faults)


def _is_request(line: Mapping[str, Any]) -> bool:
    return ID in line and isinstance(line.get(BODY), dict) and str(line.get(URL)).startswith("/v1/")


class OpenAIBatchReader:
    """A `Reader` of OpenAI batch files, in their order. Its rows hold the columns of `read.openai_body`, and the id."""

    id_column: str | None = ID

    def __init__(self, files: Sequence[InputFile], wanted: Wanted) -> None:
        spec = wanted.spec.model_copy(update={"id_column": ID})
        self._lines = TextReader(files, Wanted(spec, "none", frozenset([BODY])), line_rows)
        self.fingerprint: str = self._lines.fingerprint
        self.marked = self._lines.marked
        sample = list(itertools.islice(self._first_lines(), SAMPLE_ROWS))
        if not sample:
            names = ", ".join(file_names(files))
            raise InputError(f"input.path: {ErrorCode.EMPTY_FILE}: there is no request in {names}")
        self._model = _most_frequent(body.get("model") for line in sample if isinstance(body := line.get(BODY), dict))
        available = list(dict.fromkeys([ID, METHOD, URL, BODY, *(name for line in sample for name in line)]))
        carried = dict.fromkeys([*wanted.carried(available), URL])
        self.carried_schema = pa.schema([(name, pa.string()) for name in carried])

    @property
    def progress(self) -> float:
        return self._lines.progress

    def num_rows(self) -> int | None:
        return self._lines.num_rows()

    def batches(self) -> Iterator[RawBatch]:
        names = self.carried_schema.names
        for batch in self._lines.batches():
            faults = {position: _worded(fault) for position, fault in batch.faults.items()}
            rows: list[dict[str, Any]] = []
            cells: list[list[str | None]] = []
            for position, line in enumerate(batch.rows):
                rows.append({ID: line.get(ID)})
                cells.append([None] * len(names))
                if position in faults:
                    continue
                try:
                    cells[-1] = [_as_text(line.get(name)) for name in names]
                    rows[-1] |= self._row_values(line)
                except RowError as fault:
                    faults[position] = fault
            columns = [pa.array(column, pa.string()) for column in zip(*cells, strict=True)]
            carried = pa.RecordBatch.from_arrays(columns, schema=self.carried_schema)
            yield RawBatch(batch.file_name, batch.first_row, rows, carried, faults, ErrorCode.DUPLICATE_CUSTOM_ID)

    def _first_lines(self) -> Iterator[Mapping[str, Any]]:
        return (line for batch in self._lines.batches() for line in batch.rows)

    def _row_values(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """Raises RowError if the line is no request that this input can hold."""
        method, url, body = line.get(METHOD), line.get(URL), line.get(BODY)
        if method != "POST" or url not in (CHAT_URL, COMPLETIONS_URL):
            given = f"method and url are {shown(method)} and {shown(url)}"
            message = f"{given}; a request is POST to {CHAT_URL} or {COMPLETIONS_URL}"
            raise RowError(ErrorCode.URL_MISMATCH, message)
        if not isinstance(body, dict):
            raise RowError(ErrorCode.WRONG_TYPE, f"body is a {type(body).__name__}, not an object")
        model = body.get("model")
        if model is not None and (not isinstance(model, str) or self._model not in (None, model)):
            message = f"body.model is {shown(model)}; one input is for one model, and others name {self._model!r}"
            raise RowError(ErrorCode.MODEL_MISMATCH, message)
        return row_values(url, body)


def _most_frequent(models: Iterable[Any]) -> str | None:
    counts = Counter(model for model in models if isinstance(model, str))
    return max(counts, key=counts.__getitem__, default=None)  # of equal ones the first


def _worded(fault: RowError) -> RowError:
    """A line's fault with the code that OpenAI has for it."""
    return RowError(ErrorCode.INVALID_JSON_LINE, fault.message) if fault.code in _INVALID_LINES else fault


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError as error:  # JSON may be read at a greater depth than it is written
        raise RowError(ErrorCode.INVALID_JSON_LINE, "the line is nested too deeply") from error
