"""Python's garbage collector, made to fit a run: millions of small objects that free themselves, hardly a cycle."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Allocations before a collection of the young, and collections of one age before the next older.
RUN_THRESHOLDS = (100_000, 20, 50)


@contextmanager
def calm_collector() -> Iterator[None]:
    """While open, collections are rare and pass over what the libraries made: a quarter of the time of short rows."""
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(*RUN_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
