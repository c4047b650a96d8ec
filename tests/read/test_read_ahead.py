"""Reading ahead: nothing is lost or reordered, memory is bounded, errors arrive, and the thread always ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from batchpipe.errors import InputError
from batchpipe.read import ahead as ahead_module
from batchpipe.read.ahead import CHUNK_ROWS, Ahead


def drained(ahead: Ahead[int], size: int) -> list[int]:
    rows: list[int] = []
    while taken := ahead.take(size, block=True):
        assert len(taken) <= size
        rows += taken
    return rows


@pytest.mark.parametrize("size", [1, 7, 1_000, 10_000])
@pytest.mark.parametrize("count", [0, 1, CHUNK_ROWS, 3_000])
def test_everything_in_order(count: int, size: int) -> None:
    with Ahead(iter(range(count)), 100) as ahead:
        assert drained(ahead, size) == list(range(count))
        assert ahead.exhausted
        assert ahead.take(5, block=True) == []


def test_no_more_is_read_than_there_is_room_for() -> None:
    read = 0
    full = threading.Event()

    def rows() -> Iterator[int]:
        nonlocal read
        while True:
            read += 1
            if read >= 200:
                full.set()
            yield read

    with Ahead(rows(), 200) as ahead:
        assert full.wait(10)
        while ahead.take(0, block=False) or len(ahead._ready) < 200:
            pass
        assert read <= 200 + CHUNK_ROWS
        assert not ahead.exhausted


def test_without_block_nothing_ready_is_an_empty_list() -> None:
    gate = threading.Event()

    def rows() -> Iterator[int]:
        gate.wait(10)
        yield 1

    with Ahead(rows(), 10) as ahead:
        assert ahead.take(5, block=False) == []
        assert not ahead.exhausted
        gate.set()
        assert ahead.take(5, block=True) == [1]


def test_an_error_comes_after_the_rows_before_it() -> None:
    def rows() -> Iterator[int]:
        yield from range(CHUNK_ROWS + 10)
        raise InputError("cut off")

    with Ahead(rows(), 1_000) as ahead:
        taken = []
        with pytest.raises(InputError, match="cut off"):
            while True:
                taken += ahead.take(50, block=True)
        assert taken == list(range(CHUNK_ROWS + 10))
        assert ahead.exhausted


def test_leaving_early_ends_thread_and_iterator() -> None:
    closed = threading.Event()

    def rows() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    with pytest.raises(KeyError), Ahead(rows(), 10) as ahead:
        ahead.take(1, block=True)
        raise KeyError
    assert closed.is_set()
    assert not ahead._thread.is_alive()


def test_a_read_that_does_not_answer_is_left_behind(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ahead_module, "JOIN_SECONDS", 0.01)
    answer = threading.Event()

    def rows() -> Iterator[int]:
        answer.wait(10)
        yield 1

    with Ahead(rows(), 10) as ahead:
        pass
    assert ahead._thread.is_alive() and ahead._thread.daemon
    assert "left unread" in caplog.text
    answer.set()
    ahead._thread.join(10)
    assert not ahead._thread.is_alive()


def test_a_small_input_is_there_as_a_whole_before_it_is_taken() -> None:
    with Ahead(iter(range(10)), 100) as ahead:
        assert ahead.whole(60.0) == list(range(10))
        assert drained(ahead, 3) == list(range(10))


def test_an_input_that_is_too_large_or_too_slow_or_broken_is_not_whole() -> None:
    with Ahead(iter(range(1000)), 100) as ahead:
        assert ahead.whole(60.0) is None
    released = threading.Event()

    def slow() -> Iterator[int]:
        yield 1
        released.wait()

    with Ahead(slow(), 100) as ahead:
        assert ahead.whole(0.01) is None
        released.set()
        assert ahead.whole(60.0) == [1]

    def broken() -> Iterator[int]:
        yield 1
        raise InputError("gone")

    with Ahead(broken(), 100) as ahead:
        assert ahead.whole(60.0) is None
        assert ahead.take(1, block=True) == [1]
        with pytest.raises(InputError, match="gone"):
            ahead.take(1, block=True)
