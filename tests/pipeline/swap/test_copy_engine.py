"""The copy engines between two tiers: order, waiting, emulated speed, failures."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from batchpipe.pipeline.swap.block_copies import copy_bytes
from batchpipe.pipeline.swap.copy_engine import CopyEngine, EmulatedLink, Link, Transfer, TransferEvent

CPU = torch.device("cpu")


@contextmanager
def a_link(emulated: EmulatedLink | None = None) -> Iterator[Link]:
    link = Link(CPU, emulated)
    try:
        yield link
    finally:
        link.close()


def put(
    link: Link, engine: CopyEngine, done: list[str], name: str, urgency: int, *after: TransferEvent, num_bytes: int = 0
) -> Transfer:
    transfer = Transfer(lambda: done.append(name), num_bytes, after, link.new_event(), link.new_event(), (urgency,))
    engine.put([transfer])
    return transfer


def test_of_what_may_begin_the_most_urgent_is_first() -> None:
    done: list[str] = []
    with a_link() as link:
        opened, later = link.new_event(), link.new_event()
        put(link, link.loads, done, "third", 3, opened)
        first = put(link, link.loads, done, "first", 2, opened)
        put(link, link.loads, done, "second", 2, opened)
        last = put(link, link.loads, done, "last, though urgent", 0, opened, later)
        free = put(link, link.loads, done, "free", 9)
        link.wait(free.done)
        assert done == ["free"]
        link.record(opened)
        after = put(link, link.loads, done, "fourth", 4, first.done)
        link.wait(after.done)
        link.record(later)
        link.wait(last.done)
    assert done == ["free", "first", "second", "third", "fourth", "last, though urgent"]


def test_the_directions_do_not_wait_for_each_other() -> None:
    done: list[str] = []
    with a_link() as link:
        held = link.new_event()
        blocked = Transfer(lambda: link.wait(held), 0, (), link.new_event(), link.new_event(), (0,))
        link.stores.put([blocked])
        link.wait(put(link, link.loads, done, "load", 0).done)
        assert done == ["load"] and not blocked.done.is_recorded
        link.record(held)
        link.wait(blocked.done)


def test_an_emulated_link_takes_its_time_for_all_it_carries_and_each_direction_has_its_own() -> None:
    done: list[str] = []
    with a_link(EmulatedLink(load_bytes_per_second=1e6)) as link:
        start = link.new_event()
        start.record()
        transfers = [put(link, link.loads, done, str(i), i, num_bytes=5000) for i in range(4)]
        store = put(link, link.stores, done, "store", 0, num_bytes=1 << 40)
        link.wait(store.done)
        link.wait(transfers[-1].done)
        for number, transfer in enumerate(transfers, start=1):
            assert transfer.done.is_reached
            assert transfer.done.seconds_since(start) >= number * 5e-3
        assert store.begun.is_reached


def test_a_failure_reaches_who_waits_and_closing_ends_the_threads() -> None:
    before = threading.active_count()
    with a_link() as link:
        never = link.new_event()

        def fail() -> None:
            raise RuntimeError("no such block")

        link.loads.put([Transfer(fail, 0, (), link.new_event(), link.new_event(), (0,))])
        with pytest.raises(RuntimeError, match="no such block"):
            link.wait(never)
        link.stores.put([Transfer(fail, 0, (never,), link.new_event(), link.new_event(), (0,))])  # is never begun
    assert threading.active_count() == before


def test_copies_are_of_bytes() -> None:
    source = torch.randn(3, 8).bfloat16()
    target = torch.zeros_like(source)
    copy_bytes(target.view(torch.uint8)[1], source.view(torch.uint8)[2])
    assert torch.equal(target[1], source[2]) and not target[0].any() and not target[2].any()
