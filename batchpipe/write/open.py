"""Opening an output folder: it is locked, its job is compared with ours, and what a killed run left is repaired.

After the repair every part is in the commit log and every row log has become a part. A run that ended well is resumed
by the same code; there is no other way in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa

from batchpipe.errors import OutputError
from batchpipe.job.identity import Identity, difference
from batchpipe.write.commit import IDENTITY_KEY, PartRecord, describe_part
from batchpipe.write.durable import write_whole, writing
from batchpipe.write.folder import COMPLETIONS, STATE, OutputFolder, to_json
from batchpipe.write.lock import FolderLock
from batchpipe.write.row_log import read_log
from batchpipe.write.row_set import summarize
from batchpipe.write.schema import SCHEMA_VERSION

_PART_NAME = re.compile(r"part-(\d{5,})\.parquet")
_LOG_NAME = re.compile(r"rows-(\d{5,})\.log")


def open_output(
    path: Path,
    *,
    identity: Identity,
    job_yaml: str,
    schema: pa.Schema,
    provenance: Mapping[str, str],
    fresh: bool = False,
) -> OutputFolder:
    """Opens the folder of the job that `identity` names, creating it if needed, and recovers the rows it holds.

    `provenance` (versions, model, revision) goes into the footer of each part. With `fresh` an older output is moved
    to `<path>.old-<time>`. Raises OutputError if the folder is in use, belongs to another job or to something else
    than batchpipe, cannot be written, or has lost or doubled committed rows.
    """
    lock = _lock_folder(path, fresh)
    try:
        metadata = {f"batchpipe.{key}": value for key, value in provenance.items()}
        metadata |= {IDENTITY_KEY: identity.sha256, "batchpipe.schema_version": str(SCHEMA_VERSION)}
        _check_identity(path, identity)
        write_whole(path / STATE / "job.yaml", job_yaml.encode())
        folder = OutputFolder(path, lock, identity, schema.with_metadata(metadata))
        _recover(folder)
    except BaseException:
        lock.release()
        raise
    return folder


def next_part_number(folder: OutputFolder) -> int:
    """The number after the highest part's."""
    return max(_numbered(folder.path / COMPLETIONS, _PART_NAME), default=-1) + 1


def _lock_folder(path: Path, fresh: bool) -> FolderLock:
    state = path / STATE
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
        aside = path.with_name(f"{path.name}.old-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}")
        with writing(aside):
            path.rename(aside)
    return _lock_folder(path, fresh=False)


def _check_identity(folder: Path, identity: Identity) -> None:
    path = folder / STATE / "identity.json"
    if not path.exists():
        if any((folder / COMPLETIONS).glob("part-*.parquet")):
            raise OutputError(f"{path} is missing, so it is unknown which job {folder} belongs to; use --fresh.")
        write_whole(path, to_json({"schema_version": SCHEMA_VERSION, "identity": identity.parts}))
        return
    try:
        found = json.loads(path.read_bytes())
        version, parts = found["schema_version"], found["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path}: cannot be read ({error}); start over with --fresh.") from error
    if version != SCHEMA_VERSION:
        raise OutputError(
            f"{folder}: holds completions of layout {version}, this batchpipe writes {SCHEMA_VERSION}; choose "
            "another output.path, or move the old output aside with --fresh."
        )
    if differing := difference(parts, identity.parts):
        lines = "\n  ".join([f"{folder}: belongs to another job:", *differing])
        raise OutputError(f"{lines}\nChoose another output.path, or move the old output aside with --fresh.")


def _recover(folder: OutputFolder) -> None:
    """Raises OutputError if committed rows are gone, changed, or there twice: guessing could not bring them back."""
    completions = folder.path / COMPLETIONS
    parts = _numbered(completions, _PART_NAME)
    records, intact = folder.commit_log.read()
    for record in records:
        _check_unchanged(completions / record.name, record)
    known = {record.name for record in records}
    unrecorded = [
        describe_part(path, path.name, folder.schema.metadata) for path in parts.values() if path.name not in known
    ]
    for record in (*records, *unrecorded):
        if folder.done.overlaps(record.row_indexes):
            raise OutputError(
                f"{completions / record.name}: holds rows that another part holds too; move the copy away."
            )
        folder.take(record.row_indexes, record.counts)
        folder.parts.append(record)
    if unrecorded or not intact:
        folder.commit_log.rewrite(folder.parts)
    for number, path in _numbered(folder.state, _LOG_NAME).items():
        _settle_log(folder, number, path, committed=number in parts)


def _numbered(folder: Path, name: re.Pattern[str]) -> dict[int, Path]:
    found = {int(match[1]): path for path in folder.iterdir() if (match := name.fullmatch(path.name))}
    return dict(sorted(found.items()))


def _check_unchanged(path: Path, record: PartRecord) -> None:
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
