"""The result of `batchpipe.run`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchpipe.errors import OutputError
from batchpipe.export.parts import take_rows
from batchpipe.write.folder import part_names
from batchpipe.write.place import Place
from batchpipe.write.row_set import RowCounts

if TYPE_CHECKING:
    import pandas as pd

_SUMMARY_KEYS = (
    "rows_total",
    "rows_succeeded",
    "rows_failed",
    "rows_canceled",
    "prompt_tokens",
    "completion_tokens",
    "wall_seconds",
    "output_tokens_per_second",
    "total_tokens_per_second",
)
_SOME_ROWS_FAILED = 3


def exit_code(counts: RowCounts) -> int:
    """Of the command whose run ended with these rows."""
    return _SOME_ROWS_FAILED if counts.failed else 0


class Page(str):
    """A whole HTML page, shown by a notebook in a frame of its own."""

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{escape(self)}" style="width:100%;height:720px;border:0"></iframe>'


@dataclass(frozen=True, repr=False)
class Result:
    """An output folder, the metrics of its last run (keys as in _metrics.parquet), and the exit code of the command."""

    place: Place
    metrics: Mapping[str, Any]
    exit_code: int

    def __repr__(self) -> str:
        """Short, as notebooks show it; `metrics` has the rest."""
        rows, rate = self.metrics["rows_total"], self.metrics["output_tokens_per_second"]
        failed = f", {self.metrics['rows_failed']:,} failed" if self.metrics["rows_failed"] else ""
        return f"<Result {self.path}: {rows:,} rows{failed}, {rate:,.0f} output tokens/s>"

    @property
    def path(self) -> Any:
        """The output folder as a Path; its address as text if it lies in an object store."""
        return Path(self.place.base) if self.place.is_local else self.place.address

    @property
    def summary(self) -> dict[str, Any]:
        """The closing JSON line of the command."""
        return {"output": str(self.path), **{key: self.metrics[key] for key in _SUMMARY_KEYS}}

    def report(self) -> Page:
        """The output's report, shown by a notebook; `str` of it is the page's HTML. Raises OutputError."""
        from batchpipe.export.page.facts import gather
        from batchpipe.export.page.page import render

        return Page(render(gather(self.place)))

    def table(self) -> pa.Table:
        """All completions so far, in the order of the input. Raises OutputError if there are none yet."""
        parts = part_names(self.place)
        if not parts:
            raise OutputError(f"{self.path}: holds no completions yet; run the job again to continue it.")
        table = pa.concat_tables(pq.read_table(self.place.open(name)) for name in parts)
        order = pc.sort_indices(table, [("row_index", "ascending"), ("sample_index", "ascending")])
        return take_rows(table, order.to_numpy())

    def to_pandas(self) -> pd.DataFrame:
        return self.table().to_pandas()
