"""Named places at which a test can kill the process, as `kill -9` would."""

from __future__ import annotations

import os
from collections import Counter

CRASH_VARIABLE = "BATCHPIPE_CRASH_AT"

_times_passed: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """Ends the process if `BATCHPIPE_CRASH_AT` is `name`, or is `name:k` and this is the k-th call with `name`."""
    wanted = os.environ.get(CRASH_VARIABLE)
    if wanted is None:
        return
    _times_passed[name] += 1
    if wanted in (name, f"{name}:{_times_passed[name]}"):
        os._exit(137)
