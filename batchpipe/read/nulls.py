"""Null fields that nobody wrote: Arrow gives every struct of a column the fields of all others."""

from __future__ import annotations

from typing import Any


def without_nulls(value: Any) -> Any:
    """`value` without null fields at any depth, and with Arrow's maps, which are lists of pairs, as objects.

    The items of a list are all kept: Arrow adds none.
    """
    if isinstance(value, dict):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    if not isinstance(value, list):
        return value
    if value and all(isinstance(item, tuple) for item in value):
        return without_nulls(dict(value))
    return [without_nulls(item) for item in value]
