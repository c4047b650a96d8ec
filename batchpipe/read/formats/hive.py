"""Columns that stand in folder names: `year=2026/month=3/part-0.parquet`."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import unquote

import pyarrow as pa

from batchpipe.errors import InputError
from batchpipe.read.files import InputFile

_NULL = "__HIVE_DEFAULT_PARTITION__"


class HivePartitions:
    """The partition columns of a set of files; whole numbers throughout make an int64 column, else it is text."""

    def __init__(self, files: Sequence[InputFile]) -> None:
        self._texts = {file.path: _folder_values(file) for file in files}
        names = list(self._texts[files[0].path])
        for path, texts in self._texts.items():
            if list(texts) != names:
                raise InputError(
                    f"input.path: {path} lies in partition folders {list(texts)}, {files[0].path} in {names}"
                )
        self.schema = pa.schema([(name, _type_of([texts[name] for texts in self._texts.values()])) for name in names])

    def add_to(self, batch: pa.RecordBatch, file: InputFile) -> pa.RecordBatch:
        """`batch` with the file's partition values as further columns."""
        for column in self.schema:
            text = self._texts[file.path][column.name]
            value = int(text) if text is not None and pa.types.is_int64(column.type) else text
            values = pa.repeat(pa.scalar(value, column.type), batch.num_rows)
            batch = batch.append_column(column, values)
        return batch


def _folder_values(file: InputFile) -> dict[str, str | None]:
    pairs = [folder.partition("=") for folder in file.relative.split("/")[:-1] if "=" in folder]
    return {name: None if text == _NULL else unquote(text) for name, _, text in pairs}


def _type_of(texts: Sequence[str | None]) -> pa.DataType:
    given = [text for text in texts if text is not None]
    is_whole = bool(given) and all(_is_plain_int64(text) for text in given)
    return pa.int64() if is_whole else pa.string()


def _is_plain_int64(text: str) -> bool:
    """Whether `text` is how an int64 is written, so that the number says as much as the text (007 does not)."""
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and str(int(text)) == text and abs(int(text)) < 2**63
