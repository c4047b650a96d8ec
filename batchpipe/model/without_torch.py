"""Transformers without torch: configurations and tokenizers need none, and importing it takes most of their time."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec

_HIDDEN = {"torch", "torchvision", "torchaudio"}


def keep_torch_out() -> None:
    """Lets transformers take torch for absent, for the rest of the process; nothing if either is imported already.

    Only for a process of our own that loads no model: classes that compute cannot be used afterwards.
    """
    if "transformers" in sys.modules or "torch" in sys.modules:
        return
    find_spec = importlib.util.find_spec

    def without_torch(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name.partition(".")[0] in _HIDDEN else find_spec(name, package)

    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # one of which says that models need torch
    importlib.util.find_spec = without_torch
    try:
        from transformers.utils import import_utils

        assert not import_utils.is_torch_available(), "transformers looks for torch in another way"
    finally:
        importlib.util.find_spec = find_spec
