"""`batchpipe report`: the page of an output folder as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from batchpipe.errors import JobError
from batchpipe.export.page.facts import gather
from batchpipe.export.page.page import render
from batchpipe.write.place import open_place

FILE_NAME = "_report.html"


def report_command(path: str | Path, output: Path | None) -> dict[str, Any]:
    """Writes the page. output: its file; by default `_report.html` in the folder. Raises OutputError, and JobError."""
    place = open_place(path)
    facts = gather(place)
    page = render(facts).encode()
    if output is None:
        place.write(FILE_NAME, page)
        written = str(place / FILE_NAME)
    else:
        try:
            output.write_bytes(page)
        except OSError as error:
            raise JobError(f"--output: {output} cannot be written ({error})") from error
        written = str(output)
    return {"page": written, "bytes": len(page), "completions": facts.num_completions}
