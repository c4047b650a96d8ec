"""Outcomes to committed Parquet parts, each input row once."""

from batchpipe.write.folder import OutputFolder
from batchpipe.write.row_set import RowCounts
from batchpipe.write.schema import RESERVED_COLUMNS, check_no_clash, completions_schema, to_batch
from batchpipe.write.writer import CompletionWriter

__all__ = [
    "RESERVED_COLUMNS",
    "CompletionWriter",
    "OutputFolder",
    "RowCounts",
    "check_no_clash",
    "completions_schema",
    "to_batch",
]
