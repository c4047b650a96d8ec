"""The output folder of a run: its paths, the rows that are done, and how a part is added."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa

from batchpipe.job.identity import Identity
from batchpipe.write.commit import CommitLog, PartRecord, commit_part
from batchpipe.write.crash import crash_point
from batchpipe.write.durable import write_whole, writing
from batchpipe.write.lock import FolderLock
from batchpipe.write.row_set import Int64Array, RowCounts, RowSet

COMPLETIONS = "completions"
STATE = "_batchpipe"
SUCCESS = "_SUCCESS"


class OutputFolder:
    """An output folder that this run alone holds. `open_output` builds it; leave it as a context manager.

    `done` holds the input rows that have an outcome on disk, in a part or in the row log; `counts` are their outcomes.
    """

    def __init__(self, path: Path, lock: FolderLock, identity: Identity, schema: pa.Schema) -> None:
        self.path = path
        self.state = path / STATE
        self.schema = schema
        self.done = RowSet()
        self.counts = RowCounts()
        self.parts: list[PartRecord] = []
        self.commit_log = CommitLog(self.state / "commits.jsonl")
        self._lock = lock
        self._identity = identity
        self._attempt_path = self.state / "tmp" / uuid.uuid4().hex[:8]
        with writing(path):
            shutil.rmtree(self._attempt_path.parent, ignore_errors=True)  # parts that earlier attempts did not finish
            self._attempt_path.mkdir(parents=True)
            (path / COMPLETIONS).mkdir(exist_ok=True)

    @property
    def finished(self) -> bool:
        """Whether every row of the input has an outcome in a part."""
        return (self.path / SUCCESS).exists()

    def part_path(self, number: int) -> Path:
        return self.path / COMPLETIONS / f"part-{number:05d}.parquet"

    def log_path(self, number: int) -> Path:
        """The row log that holds the rows of part `number` until the part is committed."""
        return self.state / f"rows-{number:05d}.log"

    def take(self, row_indexes: Int64Array, counts: RowCounts) -> None:
        """Counts rows as done, each for the first time."""
        self.done.add(row_indexes)
        self.counts += counts

    def commit(self, number: int, batches: Sequence[pa.RecordBatch]) -> None:
        """Writes batches of completions as part `number`, records it, and deletes its row log if there is one."""
        path = self.part_path(number)
        record = commit_part(batches, self.schema, self._attempt_path / path.name, path)
        crash_point("before_commit_record")
        self.commit_log.append(record)
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
        write_whole(self.state / "manifest.json", to_json(manifest))
        crash_point("before_success")
        write_whole(self.path / SUCCESS, b"")

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self._attempt_path.parent, ignore_errors=True)
        self._lock.release()


def to_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
