"""Two files, one for what succeeded and one for the rest; both get their names once the last line is written."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from batchpipe.errors import OutputError
from batchpipe.export.plain_lines import Line
from batchpipe.write.durable import publish, writing


@dataclass(frozen=True, slots=True)
class Written:
    results: Path
    errors: Path
    num_results: int
    num_errors: int


def write_lines(lines: Iterable[Line], folder: Path, suffix: str, *, header: bytes = b"", replace: bool) -> Written:
    """Writes `results<suffix>` and `errors<suffix>`, each with `header` first.

    Raises OutputError if the disk refuses, or if one of the files exists and `replace` is false.
    """
    paths = [folder / f"{name}{suffix}" for name in ("errors", "results")]
    for path in paths:
        if path.exists() and not replace:
            raise OutputError(f"{path}: exists already; move it away, or give another folder as --output.")
    temporary = [path.with_name(f"{path.name}.tmp") for path in paths]
    counts = [0, 0]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with temporary[0].open("wb") as errors, temporary[1].open("wb") as results:
                files = errors, results
                for file in files:
                    file.write(header)
                for is_result, line in lines:
                    files[is_result].write(line)
                    counts[is_result] += 1
                for file in files:
                    file.flush()
                    os.fsync(file.fileno())
            for aside, path in zip(temporary, paths, strict=True):
                publish(aside, path)
        finally:
            for aside in temporary:
                aside.unlink(missing_ok=True)
    return Written(paths[1], paths[0], counts[1], counts[0])
