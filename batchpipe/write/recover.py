"""Bringing to order what a killed run left: every part is in the commit log, every row log has become a part.

This is also how a run that was ended well goes on; there is no other way in.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from batchpipe.errors import OutputError
from batchpipe.write.commit import CommitLog, PartRecord, describe_part
from batchpipe.write.durable import writing
from batchpipe.write.row_log import read_log
from batchpipe.write.row_set import summarize

if TYPE_CHECKING:
    from batchpipe.write.folder import OutputFolder

_PART_NAME = re.compile(r"part-(\d{5,})\.parquet")
_LOG_NAME = re.compile(r"rows-(\d{5,})\.log")


def recover(folder: OutputFolder, commit_log: CommitLog) -> None:
    """Raises OutputError where committed rows are gone, changed, or there twice: no guess could give them back."""
    parts = _numbered(folder.part_path(0).parent, _PART_NAME)
    records, intact = commit_log.read()
    for record in records:
        _check_unchanged(folder, record)
    known = {record.name for record in records}
    unrecorded = [
        describe_part(path, path.name, folder.schema.metadata) for path in parts.values() if path.name not in known
    ]
    for record in (*records, *unrecorded):
        _take(folder, record)
    if unrecorded or not intact:
        commit_log.rewrite(folder.parts)
    for number, path in _numbered(folder.log_path(0).parent, _LOG_NAME).items():
        _settle_log(folder, number, path, committed=number in parts)


def next_part_number(folder: OutputFolder) -> int:
    """Behind every part, once the row logs are settled."""
    return max(_numbered(folder.part_path(0).parent, _PART_NAME), default=-1) + 1


def _numbered(folder: Path, name: re.Pattern[str]) -> dict[int, Path]:
    found = {int(match[1]): path for path in folder.iterdir() if (match := name.fullmatch(path.name))}
    return dict(sorted(found.items()))


def _check_unchanged(folder: OutputFolder, record: PartRecord) -> None:
    path = folder.part_path(0).with_name(record.name)
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise OutputError(
            f"{path}: was committed and cannot be found ({error.strerror}); put it back, or start over with --fresh."
        ) from error
    if num_bytes != record.num_bytes:
        raise OutputError(
            f"{path}: was committed with {record.num_bytes} bytes and has {num_bytes} now; put it back as it was, or "
            "start over with --fresh."
        )


def _take(folder: OutputFolder, record: PartRecord) -> None:
    if folder.done.overlaps(record.row_indexes):
        raise OutputError(
            f"{folder.part_path(0).with_name(record.name)}: holds rows that another part holds too; move the copy away."
        )
    folder.take(record.row_indexes, record.counts)
    folder.parts.append(record)


def _settle_log(folder: OutputFolder, number: int, path: Path, committed: bool) -> None:
    """Turns a log into its part, so that a resumed run starts with nothing pending."""
    batches = [] if committed else read_log(path, folder.schema)
    if not batches:
        with writing(path):
            path.unlink()
        return
    for batch in batches:
        row_indexes, counts = summarize(batch)
        if folder.done.overlaps(row_indexes):
            raise OutputError(f"{path}: holds rows that a part holds already; move this file away.")
        folder.take(row_indexes, counts)
    folder.commit(number, batches)
