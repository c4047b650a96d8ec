"""The files of an input as an output folder remembers them, and what became of them since."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FileMark:
    """A file in the order of the input. fingerprint: hex digits over its name, size, beginning and end."""

    name: str
    size_bytes: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class InputChange:
    """A line for each file that differs. only_grew: all old rows are there, in their places, before any new one."""

    lines: tuple[str, ...]
    only_grew: bool


CompareInput = Callable[[Sequence[FileMark]], InputChange]
