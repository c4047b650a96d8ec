"""The output folder: whose it is, what it holds already, and how a part joins it."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import pyarrow as pa

import batchpipe
from batchpipe.errors import OutputError
from batchpipe.job.identity import Identity, difference
from batchpipe.write.commit import IDENTITY_KEY, CommitLog, PartRecord, commit_part
from batchpipe.write.crash import crash_point
from batchpipe.write.durable import write_whole, writing
from batchpipe.write.lock import FolderLock
from batchpipe.write.recover import recover
from batchpipe.write.row_set import Int64Array, RowCounts, RowSet
from batchpipe.write.schema import SCHEMA_VERSION

COMPLETIONS = "completions"
STATE = "_batchpipe"
SUCCESS = "_SUCCESS"


class OutputFolder:
    """An output folder, held by this run alone. Built by `open`; leave it as a context manager.

    `done` holds the input rows that have an outcome on disk, in a part or in the row log, and `counts` how they ended.
    """

    def __init__(self, path: Path, lock: FolderLock, identity: Identity, schema: pa.Schema) -> None:
        self.path = path
        self.schema = schema
        self.done = RowSet()
        self.counts = RowCounts()
        self.parts: list[PartRecord] = []
        self._lock = lock
        self._identity = identity
        self._commit_log = CommitLog(self._state / "commits.jsonl")
        self._attempt_path = self._state / "tmp" / uuid.uuid4().hex[:8]

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        identity: Identity,
        job_yaml: str,
        schema: pa.Schema,
        provenance: Mapping[str, str],
        fresh: bool = False,
    ) -> OutputFolder:
        """Opens the folder of the job that `identity` names, new or begun, and brings what a crash left to order.

        `provenance` (model, revision) goes into the footer of each part. With `fresh` an older output is moved aside
        to `<path>.old-<time>`. Raises OutputError where the folder is in use, another job's, nobody's, or not to be
        written.
        """
        lock = _lock_folder(path, fresh)
        try:
            footer = {"version": batchpipe.__version__, **provenance}
            metadata = {f"batchpipe.{key}": value for key, value in footer.items()}
            metadata |= {IDENTITY_KEY: identity.sha256, "batchpipe.schema_version": str(SCHEMA_VERSION)}
            folder = cls(path, lock, identity, schema.with_metadata(metadata))
            folder._check_identity()
            write_whole(folder._state / "job.yaml", job_yaml.encode())
            folder._prepare()
            recover(folder, folder._commit_log)
        except BaseException:
            lock.release()
            raise
        return folder

    @property
    def _state(self) -> Path:
        return self.path / STATE

    @property
    def finished(self) -> bool:
        """Whether every row of the input has an outcome in a part."""
        return (self.path / SUCCESS).exists()

    def part_path(self, number: int) -> Path:
        return self.path / COMPLETIONS / f"part-{number:05d}.parquet"

    def log_path(self, number: int) -> Path:
        """Where the rows of a part stand until it is committed."""
        return self._state / f"rows-{number:05d}.log"

    def take(self, row_indexes: Int64Array, counts: RowCounts) -> None:
        """Counts rows as done, each for the first time."""
        self.done.add(row_indexes)
        self.counts += counts

    def commit(self, number: int, batches: Sequence[pa.RecordBatch]) -> None:
        """Turns batches of completions into part `number`, and drops its log, if it has one."""
        path = self.part_path(number)
        record = commit_part(batches, self.schema, self._attempt_path / path.name, path)
        crash_point("before_commit_record")
        self._commit_log.append(record)
        crash_point("after_commit_record")
        self.parts.append(record)
        with writing(self.log_path(number)):
            self.log_path(number).unlink(missing_ok=True)

    def finish(self, total_rows: int) -> None:
        """Declares the output complete: manifest, then `_SUCCESS`. All of the input's rows must be in parts."""
        rows_in_parts = sum(record.counts.total for record in self.parts)
        assert rows_in_parts == len(self.done) == total_rows, f"{rows_in_parts} rows committed of {total_rows}"
        manifest = {
            "identity_sha256": self._identity.sha256,
            "rows": msgspec.to_builtins(self.counts),
            "parts": [
                {"name": part.name, "rows": part.num_rows, "bytes": part.num_bytes, "sha256": part.sha256}
                for part in sorted(self.parts, key=lambda part: part.name)
            ],
        }
        crash_point("before_manifest")
        write_whole(self._state / "manifest.json", _to_json(manifest))
        crash_point("before_success")
        write_whole(self.path / SUCCESS, b"")

    def _check_identity(self) -> None:
        path = self._state / "identity.json"
        if not path.exists():
            if any((self.path / COMPLETIONS).glob("part-*.parquet")):
                raise OutputError(f"{path} is missing, so nobody knows which job {self.path} is; use --fresh.")
            write_whole(path, _to_json({"schema_version": SCHEMA_VERSION, "identity": self._identity.parts}))
            return
        try:
            found = json.loads(path.read_bytes())
            version, parts = found["schema_version"], found["identity"]
        except (OSError, ValueError, KeyError) as error:
            raise OutputError(f"{path}: cannot be read ({error}); start over with --fresh.") from error
        if version != SCHEMA_VERSION:
            raise OutputError(
                f"{self.path}: holds completions of layout {version}, this batchpipe writes {SCHEMA_VERSION}; choose "
                "another output.path, or move the old output aside with --fresh."
            )
        if differing := difference(parts, self._identity.parts):
            raise OutputError(
                f"{self.path}: belongs to another job:\n  "
                + "\n  ".join(differing)
                + "\nChoose another output.path, or move the old output aside with --fresh."
            )

    def _prepare(self) -> None:
        with writing(self.path):
            shutil.rmtree(self._attempt_path.parent, ignore_errors=True)  # what earlier attempts left half written
            self._attempt_path.mkdir(parents=True)
            (self.path / COMPLETIONS).mkdir(exist_ok=True)

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutil.rmtree(self._attempt_path.parent, ignore_errors=True)
        self._lock.release()


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


def _to_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
