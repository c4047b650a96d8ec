"""Signals during a run: the first asks it to stop, a second ends the process, and handlers come back."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from batchpipe.runner.interrupt import SIGNALS, Interrupt

SEND_TWICE = """
import os, sys
from batchpipe.runner.interrupt import Interrupt
with Interrupt() as interrupt:
    os.kill(os.getpid(), int(sys.argv[1]))
    print(interrupt.requested, flush=True)
    os.kill(os.getpid(), int(sys.argv[2]))
    print("still here", flush=True)
"""


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1, signal.SIGINT)])
def test_a_second_signal_leaves_at_once(first: signal.Signals, second: signal.Signals) -> None:
    command = [sys.executable, "-c", SEND_TWICE, str(int(first)), str(int(second))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (75, f"{first.name}\n", "")


def test_signals_have_their_former_effect_again_after_the_run() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interrupt():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_outside_the_main_thread_signals_keep_their_effect() -> None:
    """Python sets handlers in the main thread alone; a notebook's worker may run a job all the same."""
    before = [signal.getsignal(number) for number in SIGNALS]
    during: list[object] = []

    def run() -> None:
        with Interrupt() as interrupt:
            during.extend([interrupt.requested, *(signal.getsignal(number) for number in SIGNALS)])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert during == [None, *before]
