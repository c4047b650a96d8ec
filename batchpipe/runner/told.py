"""What a run tells people beside its progress: lines for the one who reads a log tomorrow."""

from __future__ import annotations

from batchpipe.placement.placement import Placement
from batchpipe.report.lines import codes_line
from batchpipe.runner.prepare import Prepared
from batchpipe.types import Capacity
from batchpipe.write.folder import OutputFolder
from batchpipe.write.row_set import RowCounts


def start_line(prepared: Prepared, placement: Placement, folder: OutputFolder) -> str:
    """Before the model is loaded: what runs where, and how many rows."""
    split, num_rows = placement.split, prepared.source.num_rows()
    parts = [f"{prepared.model.name} ({prepared.dtype}) on {placement.device_name}"]
    parts += [f"{split.num_stages} stages"] if split.num_stages > 1 else []
    parts += [f"{split.num_replicas} replicas"] if split.num_replicas > 1 else []
    parts += [f"{num_rows:,} rows"] if num_rows is not None else []
    parts += [f"{folder.counts.total:,} rows done before"] if folder.counts.total else []
    return f"{', '.join(parts)}; writing to {folder.place.address}"


def loaded_line(load_seconds: float, capacity: Capacity, num_replicas: int) -> str:
    """Once the first step may run."""
    tokens = max(capacity.num_blocks, capacity.num_host_blocks) * capacity.block_tokens * num_replicas
    return f"ready after {load_seconds:.1f} s, with KV for {tokens:,} tokens"


def end_lines(counts: RowCounts, *, is_complete: bool) -> list[str]:
    """What is worth knowing of the rows, beside their numbers."""
    lines = []
    if is_complete and not counts.total:
        lines.append("the input holds no rows; the output is an empty table")
    if counts.failed:
        codes = codes_line(counts.failed_by_code)
        lines.append(
            f"failed rows: {codes}; error_message says why, and --retry-failed runs them again once it is mended"
        )
    return lines
