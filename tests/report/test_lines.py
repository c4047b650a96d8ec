from __future__ import annotations

import io
import re
import sys

import pytest

from batchpipe.report.lines import codes_line, say


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_of_a_log_bears_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, expected in (
        (io.StringIO(), r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d batchpipe: hi\n"),
        (Terminal(), r"batchpipe: hi\n"),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        say("hi")
        assert re.fullmatch(expected, stream.getvalue())


def test_the_most_frequent_code_comes_first() -> None:
    assert (
        codes_line({"bad_id": 1, "empty_prompt": 1200, "wrong_type": 7}) == "1,200 empty_prompt, 7 wrong_type, 1 bad_id"
    )
