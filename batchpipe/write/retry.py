"""Failed rows are taken out of the parts, so that the run that follows computes them again.

A journal names the parts before the first of them is replaced. So after a crash each is there as it was or without its
failed rows, whole either way, and the next opening of the folder reads it anew and does what is left.
"""

from __future__ import annotations

import json
from collections.abc import Collection

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchpipe.errors import OutputError
from batchpipe.types import RowStatus
from batchpipe.write.crash import crash_point
from batchpipe.write.durable import to_json
from batchpipe.write.folder import OutputFolder
from batchpipe.write.place import COMPLETIONS, STATE, SUCCESS, Place
from batchpipe.write.row_set import to_ranges

JOURNAL = f"{STATE}/retry.json"


def drop_failed(folder: OutputFolder) -> int:
    """Takes the outcomes of failed rows out of an open folder, before it has a writer; returns the number of rows."""
    num_failed = folder.counts.failed
    names = [part.name for part in folder.parts if part.counts.failed]
    if names:
        folder.place.delete(SUCCESS)  # first, so that no crash leaves an output declared complete that is not
        folder.place.write(JOURNAL, to_json({"parts": names}))
        crash_point("after_journal")
        finish_journal(folder, names)
    return num_failed


def read_journal(place: Place) -> frozenset[str]:
    """The parts of which a run that was killed may have dropped failed rows."""
    data = place.read(JOURNAL)
    if data is None:
        return frozenset()
    try:
        return frozenset(map(str, json.loads(data)["parts"]))
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{place / JOURNAL}: cannot be read ({error}); start over with --fresh.") from error


def finish_journal(folder: OutputFolder, names: Collection[str]) -> None:
    """Drops the failed rows of the parts `names`, which the journal holds, and deletes it."""
    for part in list(folder.parts):
        if part.name in names and part.counts.failed:
            folder.replace(part.name, _without_failed(folder, part.name))
            crash_point("after_part_rewrite")
    folder.rewrite_log()
    crash_point("before_journal_end")
    folder.place.delete(JOURNAL)


def _without_failed(folder: OutputFolder, name: str) -> list[pa.RecordBatch]:
    """The part without the rows of which any sample failed."""
    with folder.place.open(f"{COMPLETIONS}/{name}") as file:
        table = pq.read_table(file)
    rows = np.asarray(table.column("row_index"))
    failed = np.asarray(pc.equal(table.column("status"), RowStatus.FAILED.value))
    kept = to_ranges(np.flatnonzero(~np.isin(rows, rows[failed])))
    slices = [table.slice(first, last - first + 1) for first, last in kept]
    return [batch for piece in slices for batch in piece.cast(folder.schema).to_batches()]
