import io
import re
import sys
import types

import pytest

from batchpipe.report.progress import Progress, Reading


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now_seconds = 1000.0

    def __call__(self) -> float:
        return self.now_seconds


class Run:
    def __init__(self) -> None:
        self.reading = Reading()

    def __call__(self) -> Reading:
        return self.reading


@pytest.fixture
def run() -> Run:
    return Run()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_plain_lines_come_every_five_seconds_and_at_the_end(run: Run, clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(100, run, stream, clock) as progress:
        for second in range(12):
            clock.now_seconds = 1000.0 + second
            run.reading = Reading(second, 1, 10 * second, 20 * second, second / 100)
            progress.tick()
    stamped = stream.getvalue().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in stamped)
    lines = [line[20:] for line in stamped]
    assert [line.partition(" of")[0] for line in lines] == ["0", "5", "10", "11"]
    assert lines[1] == "5 of 100 rows (5.0%), 1 failed | tokens/s: 10 in, 20 out (20 overall) | 0:01:35 left"
    assert stream.getvalue().endswith("\n") and "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_a_terminal_gets_one_line_that_is_redrawn(run: Run, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    with Progress(None, run, stream, clock) as progress:
        for step in range(3):
            clock.now_seconds += 1
            run.reading = Reading(1000 * step, 0, 0, step, None)
            progress.tick()
    drawn = stream.getvalue()
    assert drawn.count("\n") == 1 and drawn.endswith("\n") and "\x1b" not in drawn
    pieces = drawn[:-1].split("\r")[1:]
    assert {len(piece) for piece in pieces} == {39}
    assert pieces[-1].startswith("2,000 rows, 0 failed")


def test_the_recent_rate_forgets_what_is_long_ago(run: Run, clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(None, run, stream, clock)
    for _ in range(20):
        clock.now_seconds += 5
        run.reading = Reading(0, 0, 0, 1000, None)
        progress.tick()
    assert stream.getvalue().splitlines()[-1].endswith("0 in, 0 out (10 overall)")


def test_time_left_goes_by_what_this_run_did(run: Run, clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(100, run, stream, clock)
    run.reading = Reading(80, 0, 0, 0, 0.8)
    progress.tick()
    clock.now_seconds += 60
    run.reading = Reading(90, 0, 0, 0, 0.9)
    progress.tick()
    first, second = stream.getvalue().splitlines()
    assert "left" not in first and second.endswith("0:01:00 left")


def test_an_empty_input_is_all_done(run: Run, clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(0, run, stream, clock) as progress:
        run.reading = Reading(0, 0, 0, 0, 1.0)
        progress.tick()
    assert stream.getvalue()[20:].startswith("0 of 0 rows (100.0%)")


def test_nothing_goes_to_stdout(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(1, run) as progress:
        run.reading = Reading(1, 0, 2, 3, 1.0)
        progress.tick()
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err[20:].startswith("1 of 1 rows (100.0%)")


def test_a_notebook_gets_a_tqdm_bar(run: Run, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    stream = io.StringIO()
    with Progress(10, run, stream, clock) as progress:
        clock.now_seconds += 1
        run.reading = Reading(4, 1, 10, 20, None)
        progress.tick()
    assert "4/10" in stream.getvalue() and "1 failed | tokens/s: 10 in, 20 out" in stream.getvalue()
