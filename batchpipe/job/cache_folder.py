"""Where batchpipe keeps what is made once for a machine: profiles, converted models, compiled kernels."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """$BATCHPIPE_CACHE, else `batchpipe` in $XDG_CACHE_HOME or ~/.cache. It need not exist yet."""
    if configured := os.environ.get("BATCHPIPE_CACHE"):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchpipe"


def cache_folders() -> tuple[Path, Path]:
    """`cache_folder`, then one of this user's own for machines whose home cannot be written."""
    return cache_folder(), Path(tempfile.gettempdir()) / f"batchpipe-{os.getuid()}"
