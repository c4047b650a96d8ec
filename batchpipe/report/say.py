"""One line to people about the run, on stderr as progress is."""

from __future__ import annotations

import sys


def say(line: str) -> None:
    print(f"batchpipe: {line}", file=sys.stderr, flush=True)
