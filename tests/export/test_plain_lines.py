"""JSON lines and CSV of every type that a carried column may have."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from batchpipe.export.plain_lines import csv_header, csv_lines, json_lines

VALUES: list[tuple[Any, Any, str]] = [
    (None, None, ""),
    (True, True, "true"),
    (7, 7, "7"),
    (0.25, 0.25, "0.25"),
    ('a\nb,"c"\r', 'a\nb,"c"\r', 'a\nb,"c"\r'),
    ("\u00e9\u4e2d", "\u00e9\u4e2d", "\u00e9\u4e2d"),
    ([1, None], [1, None], "[1,null]"),
    ({"a": {"b": ["x"]}}, {"a": {"b": ["x"]}}, '{"a":{"b":["x"]}}'),
    ([("key", 1)], [["key", 1]], '[["key",1]]'),
    (b"\x00\xff", "AP8=", "AP8="),
    (Decimal("1.50"), "1.50", "1.50"),
    (date(2024, 1, 31), "2024-01-31", "2024-01-31"),
    (datetime(2024, 1, 31, 12, tzinfo=UTC), "2024-01-31T12:00:00+00:00", "2024-01-31T12:00:00+00:00"),
    (timedelta(seconds=90), "0:01:30", "0:01:30"),
    ([Decimal("2.5"), b"x"], ["2.5", "eA=="], '["2.5","eA=="]'),
]


def row(value: Any, status: str = "succeeded") -> dict[str, Any]:
    return {"row_id": "r", "status": status, "value": value}


@pytest.mark.parametrize(("value", "as_json", "as_cell"), VALUES, ids=[repr(value) for value, *_ in VALUES])
def test_values(value: Any, as_json: Any, as_cell: str) -> None:
    [(_, line)] = json_lines([row(value)])
    assert line.endswith(b"\n") and json.loads(line) == row(as_json)
    [(_, cells)] = csv_lines([row(value)])
    text = io.StringIO((csv_header(["row_id", "status", "value"]) + cells).decode(), newline="")
    assert list(csv.DictReader(text)) == [{"row_id": "r", "status": "succeeded", "value": as_cell}]


def test_json_has_no_nan(recwarn: pytest.WarningsRecorder) -> None:
    [(_, line)] = json_lines([row(float("nan"))])
    assert json.loads(line)["value"] is None


@pytest.mark.parametrize("lines", [json_lines, csv_lines])
def test_only_what_succeeded_is_a_result(lines: Any) -> None:
    rows = [row(1, status) for status in ("succeeded", "failed", "canceled")]
    assert [is_result for is_result, _ in lines(rows)] == [True, False, False]
