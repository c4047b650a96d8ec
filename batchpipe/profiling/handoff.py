"""How long hidden states take from one process to another: sent to a second process and back.

    python -m batchpipe.profiling.handoff   (the second process; started by `measure_handoff`, told all on stdin)

Through shared memory, as between stages on the CPU.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch

from batchpipe.pipeline.channel import Payload, SharedMemoryChannel
from batchpipe.pipeline.messages import Closed

_NUM_REPETITIONS = 200
_LARGE_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Handoff:
    """One way. `latency_seconds` is that of a single token's hidden states."""

    latency_seconds: float
    bytes_per_second: float


def measure_handoff(hidden_size: int, dtype: torch.dtype) -> Handoff:
    """Medians over many round trips with one token and with many.

    On a thread at each end: two sets of threads on the same processors would wait for each other.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    payload = Payload(_LARGE_TOKENS, hidden_size, dtype)
    memories = [SharedMemoryChannel.make_memory(payload) for _ in range(2)]
    bells = [socket.socketpair() for _ in range(2)]
    theirs = [bell[1].fileno() for bell in bells]
    numbers = (*memories, *theirs, hidden_size)
    process = subprocess.Popen(
        [sys.executable, "-m", "batchpipe.profiling.handoff"],
        stdin=subprocess.PIPE,
        pass_fds=(*memories, *theirs),
        text=True,
    )
    try:
        assert process.stdin is not None
        with process.stdin as stdin:
            stdin.write(f"{str(dtype).removeprefix('torch.')} {' '.join(map(str, numbers))}")
        for bell in bells:
            bell[1].close()
        out = SharedMemoryChannel(memories[0], bells[0][0], payload)
        back = SharedMemoryChannel(memories[1], bells[1][0], payload)
        small, large = (_one_way_seconds(out, back, tokens, payload) for tokens in (1, _LARGE_TOKENS))
    finally:
        for bell in bells:
            bell[0].close()  # which ends the other process
        for memory in memories:
            os.close(memory)
        process.wait()
        torch.set_num_threads(num_threads)
    return Handoff(small, payload.nbytes / max(large - small, 1e-9))


def _one_way_seconds(out: SharedMemoryChannel, back: SharedMemoryChannel, num_tokens: int, payload: Payload) -> float:
    hidden = torch.zeros(num_tokens, payload.hidden_size, dtype=payload.dtype)
    seconds = []
    for _ in range(_NUM_REPETITIONS):
        started = perf_counter()
        out.send(hidden)
        back.receive(num_tokens)
        seconds.append((perf_counter() - started) / 2)
        back.release()
    return median(seconds)


def _echo() -> None:
    """Sends back what comes: the same numbers of tokens, as often, as `measure_handoff` sends."""
    torch.set_num_threads(1)
    dtype, *numbers = sys.stdin.read().split()
    memory_in, memory_out, bell_in, bell_out, hidden_size = map(int, numbers)
    payload = Payload(_LARGE_TOKENS, hidden_size, getattr(torch, dtype))
    incoming = SharedMemoryChannel(memory_in, socket.socket(fileno=bell_in), payload)
    outgoing = SharedMemoryChannel(memory_out, socket.socket(fileno=bell_out), payload)
    try:
        for num_tokens in (1, _LARGE_TOKENS):
            for _ in range(_NUM_REPETITIONS):
                outgoing.send(incoming.receive(num_tokens))
                incoming.release()
        incoming.receive(1)  # nothing more comes: stays until the other end, which may still release, has closed
    except Closed:
        return


if __name__ == "__main__":
    _echo()
