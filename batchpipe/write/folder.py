"""The output folder of a run: its paths, the rows that are done, and how a part is added."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pyarrow as pa

from batchpipe.write.belonging import Owner
from batchpipe.write.commit import CommitLog, PartRecord, commit_part
from batchpipe.write.crash import crash_point
from batchpipe.write.durable import to_json, writing
from batchpipe.write.lock import PlaceLock
from batchpipe.write.place import COMMITS, COMPLETIONS, PART_NAME, STATE, SUCCESS, Place
from batchpipe.write.row_set import Int64Array, RowCounts, RowSet

# A remote place gets the commit log again this often; the parts that it lacks are read by a run that resumes elsewhere.
_LOG_UPLOAD_SECONDS = 30.0


class OutputFolder:
    """An output folder that this run alone holds. `open_output` builds it; leave it as a context manager.

    `done` holds the input rows that have an outcome on disk, in a part or in the row log; `counts` are their outcomes.
    """

    def __init__(self, place: Place, lock: PlaceLock, owner: Owner, schema: pa.Schema) -> None:
        self.place = place
        self.state = place.working
        self.schema = schema
        self.done = RowSet()
        self.counts = RowCounts()
        self.parts: list[PartRecord] = []
        self.commit_log = CommitLog(self.state / COMMITS)
        self._log_upload_seconds = time.monotonic()
        self._lock = lock
        self._owner = owner
        self._attempt_path = self.state / "tmp" / uuid.uuid4().hex[:8]
        with writing(self.state):
            shutil.rmtree(self._attempt_path.parent, ignore_errors=True)  # parts that earlier attempts did not finish
            self._attempt_path.mkdir(parents=True)
        place.make_folder(COMPLETIONS)

    @property
    def identities(self) -> frozenset[bytes]:
        """What the footers of its parts may name as their job: it, or it before it was extended."""
        return self._owner.identities

    @property
    def finished(self) -> bool:
        """Whether every row of the input has an outcome in a part."""
        return self.place.size_bytes(SUCCESS) is not None

    def log_path(self, number: int) -> Path:
        """The row log that holds the rows of part `number` until the part is committed."""
        return self.state / f"rows-{number:05d}.log"

    def take(self, row_indexes: Int64Array, counts: RowCounts) -> None:
        """Counts rows as done, each for the first time."""
        self.done.add(row_indexes)
        self.counts += counts

    def commit(self, number: int, batches: Sequence[pa.RecordBatch]) -> None:
        """Writes batches of completions as part `number`, records it, and deletes its row log if there is one."""
        self._lock.check()
        temporary = self._attempt_path / f"part-{number:05d}.parquet"
        record = commit_part(batches, self.schema, temporary, self.place, f"{COMPLETIONS}/{temporary.name}")
        crash_point("before_commit_record")
        self.commit_log.append(record)
        crash_point("after_commit_record")
        self.parts.append(record)
        if time.monotonic() - self._log_upload_seconds >= _LOG_UPLOAD_SECONDS:
            self._upload_log()
        with writing(self.log_path(number)):
            self.log_path(number).unlink(missing_ok=True)

    def replace(self, name: str, batches: Sequence[pa.RecordBatch]) -> None:
        """Writes the part `name` anew, with fewer rows than it has; then `rewrite_log` must record it."""
        self._lock.check()
        temporary = self._attempt_path / name
        record = commit_part(batches, self.schema, temporary, self.place, f"{COMPLETIONS}/{name}")
        self.parts = [record if part.name == name else part for part in self.parts]
        self.done, self.counts = RowSet(), RowCounts()
        for part in self.parts:
            self.take(part.row_indexes, part.counts)

    def rewrite_log(self) -> None:
        """Makes the commit log say what `parts` are, in the store too."""
        self.commit_log.rewrite(self.parts)
        self._upload_log()

    def finish(self, total_rows: int) -> None:
        """Declares the output complete: manifest, then `_SUCCESS`. All of the input's rows must be in parts."""
        rows_in_parts = sum(record.counts.total for record in self.parts)
        assert rows_in_parts == len(self.done) == total_rows, f"{rows_in_parts} rows committed of {total_rows}"
        self._lock.check()
        self._upload_log()
        manifest = {
            "identity_sha256": self._owner.identity.sha256,
            "rows": msgspec.to_builtins(self.counts),
            "parts": [
                {"name": part.name, "rows": part.num_rows, "bytes": part.num_bytes, "sha256": part.sha256}
                for part in sorted(self.parts, key=lambda part: part.name)
            ],
        }
        crash_point("before_manifest")
        self.place.write(f"{STATE}/manifest.json", to_json(manifest))
        crash_point("before_success")
        self.place.write(SUCCESS, b"")

    def _upload_log(self) -> None:
        self._log_upload_seconds = time.monotonic()
        if not self.place.is_local:
            self.place.write(f"{STATE}/{COMMITS}", (self.state / COMMITS).read_bytes())

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self._attempt_path.parent, ignore_errors=True)
        self._lock.release()


def part_names(place: Place) -> list[str]:
    """The committed parts of completions in their order, as names in `place`."""
    names = sorted(place.sizes_bytes(COMPLETIONS))
    return [f"{COMPLETIONS}/{name}" for name in names if PART_NAME.fullmatch(name)]
