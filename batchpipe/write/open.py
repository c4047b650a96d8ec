"""Opening an output folder: it is locked, its job is compared with ours, and what a killed run left is repaired.

After the repair every part is in the commit log and every row log has become a part. A run that ended well is resumed
by the same code; there is no other way in.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchpipe.errors import OutputError
from batchpipe.job.identity import Identity
from batchpipe.job.input_files import CompareInput, FileMark
from batchpipe.write.belonging import claim
from batchpipe.write.commit import IDENTITY_KEY, PartRecord, describe_part
from batchpipe.write.durable import writing
from batchpipe.write.folder import OutputFolder
from batchpipe.write.lock import FolderLock
from batchpipe.write.place import COMMITS, COMPLETIONS, LOG_NAME, PART_NAME, STATE, Place, open_place
from batchpipe.write.remote_lock import RemoteLock
from batchpipe.write.retry import finish_journal, read_journal
from batchpipe.write.row_log import read_log
from batchpipe.write.row_set import summarize
from batchpipe.write.schema import SCHEMA_VERSION

logger = logging.getLogger(__name__)

STARTED = "started"  # in the state folder: a template's date is that of the job, also when it goes on tomorrow


def open_output(
    path: str | Path,
    *,
    identity: Identity,
    job_yaml: str,
    schema: pa.Schema,
    provenance: Mapping[str, str],
    input_files: Sequence[FileMark] = (),
    compare_input: CompareInput | None = None,
    fresh: bool = False,
    extend: bool = False,
    started_at: datetime | None = None,
) -> OutputFolder:
    """Opens the folder of the job that `identity` names, creating it if needed, and recovers the rows it holds.

    `path` is a local folder or an address of an object store (`batchpipe.write.place`).

    `provenance` (versions, model, revision) goes into the footer of each part. With `fresh` an older output is moved
    to `<path>.old-<time>`. With `extend` the folder of the same job over a smaller input becomes this job's, by
    `input_files` and what `compare_input` says of earlier ones. `started_at` is kept of the job's first start.

    Raises OutputError if the folder is in use, belongs to another job or to something else
    than batchpipe, cannot be written, or has lost or doubled committed rows.
    """
    place = open_place(path)
    lock = _lock_folder(place, fresh) if place.is_local else _lock_remote(place, fresh)
    try:
        metadata = {f"batchpipe.{key}": value for key, value in provenance.items()}
        metadata |= {IDENTITY_KEY: identity.sha256, "batchpipe.schema_version": str(SCHEMA_VERSION)}
        check_columns = partial(_check_columns, place, schema)
        owner = claim(place, identity, input_files, compare_input, check_columns if extend else None)
        place.write(f"{STATE}/job.yaml", job_yaml.encode())
        if place.size_bytes(f"{STATE}/{STARTED}") is None:
            place.write(f"{STATE}/{STARTED}", (started_at or datetime.now().astimezone()).isoformat().encode())
        folder = OutputFolder(place, lock, owner, schema.with_metadata(metadata))
        _recover(folder)
    except BaseException:
        lock.release()
        raise
    return folder


def is_begun(path: str | Path) -> bool:
    """Whether a run has begun to write there, of whatever job."""
    return open_place(path).size_bytes(f"{STATE}/identity.json") is not None


def first_start(path: str | Path) -> datetime | None:
    """When the job of this output folder was started for the first time; None if that is not known there."""
    place = open_place(path)
    kept = place.read(f"{STATE}/{STARTED}")
    if kept is None:
        return None
    try:
        return datetime.fromisoformat(kept.decode().strip())
    except ValueError as error:
        raise OutputError(f"{place / STATE}/{STARTED}: is no time ({error}); remove it.") from error


def next_part_number(folder: OutputFolder) -> int:
    """The number after the highest part's."""
    return max(_numbered(folder.place.sizes_bytes(COMPLETIONS), PART_NAME), default=-1) + 1


def _lock_folder(place: Place, fresh: bool) -> FolderLock:
    path, state = Path(place.base), place.working
    begun = state.is_dir()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not begun and any(path.iterdir()):
            raise OutputError(
                f"{path}: holds files, but is no output folder of batchpipe; set output.path to another folder."
            )
        state.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"output.path: {path} cannot be made a folder to write to: {error.strerror}.") from error
    lock = FolderLock(state / "lock")
    if not (begun and fresh):
        return lock
    with lock:
        _move_aside(place)
    return _lock_folder(place, fresh=False)


def _lock_remote(place: Place, fresh: bool) -> RemoteLock:
    """The lock of a remote place, and this machine's copy of its commit log."""
    begun = bool(place.sizes_bytes(STATE))
    if not begun and place.sizes_bytes():
        raise OutputError(
            f"{place.address}: holds files, but is no output folder of batchpipe; set output.path to another one."
        )
    lock = RemoteLock(place)
    if begun and fresh:
        with lock:
            _move_aside(place)
        return _lock_remote(place, fresh=False)
    commits = place.working / COMMITS
    if not commits.exists():
        with writing(commits):
            commits.write_bytes(place.read(f"{STATE}/{COMMITS}") or b"")
    return lock


def _move_aside(place: Place) -> None:
    aside = f"{place.base}.old-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}"
    place.move_to(aside)
    logger.warning("output.path: the old output was moved to %s", aside)


def _check_columns(place: Place, schema: pa.Schema) -> None:
    """Raises OutputError if the rows that are there have other columns: a larger input may have other types."""
    names = sorted(name for name in place.sizes_bytes(COMPLETIONS) if PART_NAME.fullmatch(name))
    for name in names[:1]:
        with place.open(f"{COMPLETIONS}/{name}") as file:
            found = pq.read_schema(file)
        if not found.equals(schema):
            raise OutputError(
                f"{place / COMPLETIONS}/{name}: has other columns than the input has now, whose types go by its first "
                "rows, so it cannot be extended; choose another output.path, or start over with --fresh."
            )
    for path in place.working.glob("rows-*.log"):
        read_log(path, schema)


def _recover(folder: OutputFolder) -> None:
    """Raises OutputError if committed rows are gone, changed, or there twice: guessing could not bring them back."""
    sizes_bytes = folder.place.sizes_bytes(COMPLETIONS)
    parts = _numbered(sizes_bytes, PART_NAME)
    records, intact = folder.commit_log.read()
    journal = read_journal(folder.place)
    records = [record for record in records if record.name not in journal]  # those are read anew
    for record in records:
        _check_unchanged(_part_path(folder, record.name), record, sizes_bytes.get(record.name))
    known = {record.name for record in records}
    unrecorded = [_described(folder, name) for name in parts.values() if name not in known]
    for record in (*records, *unrecorded):
        if folder.done.overlaps(record.row_indexes):
            path = _part_path(folder, record.name)
            raise OutputError(f"{path}: holds rows that another part holds too; move the copy away.")
        folder.take(record.row_indexes, record.counts)
        folder.parts.append(record)
    if unrecorded or not intact:
        folder.commit_log.rewrite(folder.parts)
    logs = _numbered((path.name for path in folder.state.iterdir()), LOG_NAME)
    for number, name in logs.items():
        _settle_log(folder, number, folder.state / name, committed=number in parts)
    if journal:
        finish_journal(folder, journal)


def _numbered(names: Iterable[str], pattern: re.Pattern[str]) -> dict[int, str]:
    return dict(sorted((int(match[1]), name) for name in names if (match := pattern.fullmatch(name))))


def _part_path(folder: OutputFolder, name: str) -> str:
    return folder.place / f"{COMPLETIONS}/{name}"


def _described(folder: OutputFolder, name: str) -> PartRecord:
    path = _part_path(folder, name)
    try:
        file = folder.place.open(f"{COMPLETIONS}/{name}")
    except OSError as error:
        raise OutputError(f"{path}: cannot be read as a part of the completions: {error}") from error
    with file:
        return describe_part(file, path, folder.identities)


def _check_unchanged(path: str, record: PartRecord, num_bytes: int | None) -> None:
    if num_bytes is None:
        raise OutputError(f"{path}: was committed and cannot be found; put it back, or start over with --fresh.")
    if num_bytes != record.num_bytes:
        raise OutputError(
            f"{path}: was committed with {record.num_bytes} bytes and has {num_bytes} now; put it back as it was, or "
            "start over with --fresh."
        )


def _settle_log(folder: OutputFolder, number: int, path: Path, committed: bool) -> None:
    """Turns a row log into its part, so that a resumed run starts with nothing pending."""
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
