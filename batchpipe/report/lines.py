"""Single lines to people, on stderr as progress is; where a log is written they bear the time."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import datetime


def say(line: str) -> None:
    """One line about the run."""
    time = "" if sys.stderr.isatty() or "ipykernel" in sys.modules else f"{datetime.now():%Y-%m-%d %H:%M:%S} "
    print(f"{time}batchpipe: {line}", file=sys.stderr, flush=True)


def codes_line(codes: Mapping[str, int]) -> str:
    """Numbers of failed rows by error code, the most frequent first."""
    return ", ".join(f"{count:,} {code}" for code, count in sorted(codes.items(), key=lambda item: -item[1]))
