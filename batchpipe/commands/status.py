"""What an output folder holds right now, also while a run fills it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from batchpipe.errors import OutputError
from batchpipe.report.lines import codes_line
from batchpipe.report.metrics import read_metrics
from batchpipe.report.note import Note, read_note
from batchpipe.write.commit import PartRecord, read_commits
from batchpipe.write.lock import holder
from batchpipe.write.place import COMMITS, COMPLETIONS, LOG_NAME, STATE, SUCCESS, Place, open_place
from batchpipe.write.row_log import read_log
from batchpipe.write.row_set import RowCounts, summarize


def status_of(path: str | Path) -> dict[str, Any]:
    """Input rows that have an outcome on disk, their tokens, the process at work (None: none), the last run's metrics.

    rows_total: of the input; None where no run has said it yet. Speed and time left are None unless a run is at work.
    Raises OutputError where `path` is no output folder. Takes nothing from a run under way.
    """
    place = open_place(path)
    if place.size_bytes(f"{STATE}/identity.json") is None:
        raise OutputError(f"{path}: is no output folder of batchpipe (it has no {STATE}/identity.json).")
    logged = _logged(place)  # before the commits: a log may become a part meanwhile, not the other way round
    records, _ = read_commits(place.read(f"{STATE}/{COMMITS}") or b"")
    committed = sum((record.counts for record in records), RowCounts())
    in_parts = {record.name for record in records}
    pending = (counts for number, counts in logged.items() if f"part-{number:05d}.parquet" not in in_parts)
    counts = sum(pending, committed)
    missing = _missing(place, records)
    finished = place.size_bytes(SUCCESS) is not None
    note, runs = read_note(place.working), read_metrics(place)
    running = holder(place.working / "lock") if place.is_local else _remote_holder(place)
    return {
        "path": str(path),
        "finished": finished and not missing,
        "running": running,
        **_total(note, counts, finished),
        "rows_done": counts.total,
        "rows_succeeded": counts.succeeded,
        "rows_failed": counts.failed,
        "rows_canceled": counts.canceled,
        "rows_committed": committed.total,
        "failed_by_code": dict(counts.failed_by_code),
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
        **_speed(note if running is not None else None),
        "parts": len(records),
        "parts_missing": missing,
        "bytes": sum(record.num_bytes for record in records),
        "last_run": {key: value for key, value in runs[-1].items() if key != "timeline"} if runs else None,
    }


def describe_status(status: Mapping[str, Any]) -> str:
    """The status in some lines for people."""
    running, total = status["running"], status["rows_total"]
    if running is not None:
        by = f"process {running['pid']} on {running['host']} since {running['since']}" if running else "a process"
        state = f"{by} is at work"
    elif status["parts_missing"]:
        state = "damaged"
    else:
        state = "finished" if status["finished"] else "not finished, and no process is at work; `batchpipe run` goes on"
    of_total = ""
    if total is not None:
        about = "about " if status["rows_total_is_estimate"] else ""
        of_total = f" of {about}{total:,} ({status['rows_done'] / total if total else 1.0:.1%})"
    rows = f"  {status['rows_done']:,}{of_total} rows done: {status['rows_succeeded']:,} succeeded"
    rows += "".join(f", {status[f'rows_{kind}']:,} {kind}" for kind in ("failed", "canceled") if status[f"rows_{kind}"])
    lines = [f"{status['path']}: {state}", rows]
    if codes := status["failed_by_code"]:
        lines.append(f"  failed: {codes_line(codes)}")
    lines.append(f"  their tokens: {status['prompt_tokens']:,} in, {status['completion_tokens']:,} out")
    if status["output_tokens_per_second"] is not None:
        left = status["seconds_left"]
        lines[-1] += f"; now {status['output_tokens_per_second']:,.0f} out/s"
        lines[-1] += "" if left is None else f", {timedelta(seconds=round(left))} left"
    lines.append(
        f"  {status['rows_committed']:,} of them in {status['parts']:,} parts, {status['bytes'] / 2**20:,.1f} MiB"
    )
    return "\n".join([*lines, *(f"  {problem}" for problem in status["parts_missing"])])


def _logged(place: Place) -> dict[int, RowCounts]:
    """Rows that wait in row logs, by the number of their part to be."""
    counts: dict[int, RowCounts] = {}
    for path in place.working.glob("rows-*.log") if place.working.is_dir() else ():
        named = LOG_NAME.fullmatch(path.name)
        if named is None:
            continue
        try:
            batches = read_log(path)
        except OutputError:  # it became a part just now, or is damaged, which the next run says
            continue
        counts[int(named[1])] = sum((summarize(batch)[1] for batch in batches), RowCounts())
    return counts


def _remote_holder(place: Place) -> dict[str, object] | None:
    from batchpipe.write.remote_lock import remote_holder

    return remote_holder(place)


def _missing(place: Place, records: list[PartRecord]) -> list[str]:
    """A line for each committed part that is not there as it was written."""
    sizes_bytes = place.sizes_bytes(COMPLETIONS)
    return [
        f"{place / COMPLETIONS}/{record.name}: "
        + (
            f"has {sizes_bytes[record.name]} bytes of {record.num_bytes}"
            if record.name in sizes_bytes
            else "is missing"
        )
        + "; put it back, or start over with `batchpipe run --fresh`"
        for record in records
        if sizes_bytes.get(record.name) != record.num_bytes
    ]


def _total(note: Note | None, counts: RowCounts, finished: bool) -> dict[str, Any]:
    if finished:
        return {"rows_total": counts.total, "rows_total_is_estimate": False}
    if note is None:
        return {"rows_total": None, "rows_total_is_estimate": False}
    return {"rows_total": note.rows_total, "rows_total_is_estimate": note.rows_total_is_estimate}


def _speed(note: Note | None) -> dict[str, Any]:
    rate = note.output_tokens / note.seconds if note is not None and note.seconds > 0 else None
    return {"output_tokens_per_second": rate, "seconds_left": note.seconds_left if note is not None else None}
