"""What an output folder holds right now, also while a run fills it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from batchpipe.errors import OutputError
from batchpipe.report.metrics import read_metrics
from batchpipe.write.commit import read_commits
from batchpipe.write.folder import COMMITS
from batchpipe.write.lock import holder
from batchpipe.write.place import STATE, SUCCESS, open_place
from batchpipe.write.remote_lock import remote_holder
from batchpipe.write.row_set import RowCounts


def status_of(path: str | Path) -> dict[str, Any]:
    """Counts of committed input rows, parts, its process (None: it does not run) and the metrics of the last run.

    Rows that stand in the row log, waiting for their part to fill, are not counted yet.
    Raises OutputError where `path` is no output folder. Takes nothing from a run under way.
    """
    place = open_place(path)
    if place.size_bytes(f"{STATE}/identity.json") is None:
        raise OutputError(f"{path}: is no output folder of batchpipe (it has no {STATE}/identity.json).")
    records, _ = read_commits(place.read(f"{STATE}/{COMMITS}") or b"")
    counts = sum((record.counts for record in records), RowCounts())
    runs = read_metrics(place)
    return {
        "path": str(path),
        "finished": place.size_bytes(SUCCESS) is not None,
        "running": holder(place.working / "lock") if place.is_local else remote_holder(place),
        "rows_done": counts.total,
        "rows_succeeded": counts.succeeded,
        "rows_failed": counts.failed,
        "rows_canceled": counts.canceled,
        "parts": len(records),
        "bytes": sum(record.num_bytes for record in records),
        "last_run": runs[-1] if runs else None,
    }
