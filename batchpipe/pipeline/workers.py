"""The processes of one pipeline, a worker per stage: they start side by side, load, allocate, and answer steps.

A worker that dies closes its socket, which wakes the controller; one that is silent for longer than its limit counts as
lost. Either way all workers of the pipeline are ended, and the error names the stage, what it was to do, and the cause.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import NoReturn, TypeVar

import torch

from batchpipe.errors import WorkerError
from batchpipe.pipeline.channel import Payload, SharedMemoryChannel
from batchpipe.pipeline.memory import StageMemory
from batchpipe.pipeline.messages import Allocate, Allocated, Answer, Closed, Failed, Loaded, Wire
from batchpipe.pipeline.stage import StageSpec
from batchpipe.pipeline.worker import NEIGHBOUR_LOST, LinkSpec, Transport, WorkerSpec
from batchpipe.types import Capacity

WORKER_COMMAND = (sys.executable, "-m", "batchpipe.pipeline.worker")
# What the slowest disk or the slowest memory still does; a worker that takes longer than this allows hangs.
SLOWEST_BYTES_PER_SECOND = 20e6
_LONGEST_START_SECONDS = 24 * 3600.0  # whatever amount is asked for
_SECONDS_TO_LEAVE = 2.0

Expected = TypeVar("Expected", bound=Answer)


@dataclass(frozen=True, slots=True)
class Limits:
    """The longest silence of a worker. Loading and allocating get more time, by `SLOWEST_BYTES_PER_SECOND`."""

    start_seconds: float = 600.0
    step_seconds: float = 600.0

    def start(self, num_bytes: int) -> float:
        return min(_LONGEST_START_SECONDS, self.start_seconds + num_bytes / SLOWEST_BYTES_PER_SECOND)


DEFAULT_LIMITS = Limits()


class WorkerGroup:
    """`load`, then `allocate`, then `send` steps and `hear` reports. A worker dies with the thread that started it."""

    def __init__(self, specs: Sequence[StageSpec], transport: Transport, limits: Limits) -> None:
        self.device_names: tuple[str, ...] = ()
        self._specs = specs
        self._transport = transport
        self.limits = limits
        self._controls: list[Wire] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._bytes_per_block = 0
        self._resources = ExitStack()
        try:
            self._selector = self._resources.enter_context(selectors.DefaultSelector())
            self._folder = self._resources.enter_context(tempfile.TemporaryDirectory(prefix="batchpipe-"))
            self._resources.callback(self._end_processes)
            self._start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends every process; may be called again."""
        self._resources.close()

    def restarted(self) -> WorkerGroup:
        """Ends these processes and starts others like them."""
        self.close()
        return WorkerGroup(self._specs, self._transport, self.limits)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    @property
    def sockets(self) -> list[socket.socket]:
        """A socket becomes readable when its worker has sent something or is gone."""
        return [control.socket for control in self._controls]

    def load(self) -> list[StageMemory]:
        """Waits until every stage has loaded its layers. Raises ModelError or WorkerError and is closed then."""
        num_bytes = sum(path.stat().st_size for path in Path(self._specs[0].model_folder).glob("*") if path.is_file())
        loaded = self._await_all(Loaded, "loading its layers", self.limits.start(num_bytes))
        self.device_names = tuple(answer.device_name for answer in loaded)
        self._bytes_per_block = max(answer.bytes_per_block for answer in loaded)
        return [StageMemory(answer.free_bytes, answer.bytes_per_block, answer.block_tokens) for answer in loaded]

    def allocate(self, capacity: Capacity) -> None:
        """Gives every stage its KV. Raises MemoryLimitError or WorkerError and is closed then."""
        self.send(Allocate(capacity.num_blocks, capacity.num_host_blocks, capacity.streams_per_block))
        num_bytes = (capacity.num_blocks + capacity.num_host_blocks) * self._bytes_per_block
        self._await_all(Allocated, "allocating its KV", self.limits.start(num_bytes))

    def send(self, message: object) -> None:
        """To all stages. Raises WorkerError if one is gone."""
        for index, control in enumerate(self._controls):
            try:
                control.send(message)
            except Closed:
                self._lost(index)

    def hear(self, timeout_seconds: float) -> list[tuple[int, Answer]]:
        """At most one answer of each stage, with its index; none if all are silent for `timeout_seconds`."""
        answers: list[tuple[int, Answer]] = []
        for key, _ in self._selector.select(timeout_seconds):
            try:
                answer = self._controls[key.data].receive_answer()
            except Closed:
                self._lost(key.data)
            if isinstance(answer, Failed):
                self._failed(key.data, answer)
            answers.append((key.data, answer))
        return answers

    def silent(self, index: int, doing: str, limit_seconds: float) -> NoReturn:
        self.close()
        raise WorkerError(f"{self._name(index)} said nothing for {limit_seconds:.0f} s while {doing}")

    # -- starting --------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        with ExitStack() as inherited:  # what the workers have of their own once they run
            links = [self._make_link(sender, inherited) for sender in range(len(self._specs) - 1)]
            for index, spec in enumerate(self._specs):
                ours, theirs = socket.socketpair()
                inherited.enter_context(theirs)
                self._controls.append(Wire(ours))
                self._selector.register(ours, selectors.EVENT_READ, index)
                incoming = links[index - 1][1] if index > 0 else None
                outgoing = links[index][0] if index < len(links) else None
                self._spawn(theirs.fileno(), [end for end in (incoming, outgoing) if end is not None])
                rendezvous = f"file://{self._folder}/rendezvous"
                worker = WorkerSpec(spec, os.getpid(), self._transport, rendezvous, incoming, outgoing)
                try:
                    self._controls[index].send(worker)
                except Closed:
                    self._lost(index)

    def _make_link(self, sender: int, inherited: ExitStack) -> tuple[LinkSpec, LinkSpec]:
        """The sending and the receiving end between stage `sender` and the next."""
        if self._transport != "shared_memory":
            return LinkSpec(peer=sender + 1), LinkSpec(peer=sender)
        spec = self._specs[sender]
        payload = Payload(spec.max_step_tokens, spec.hidden_size, getattr(torch, spec.dtype))
        memory_fd = SharedMemoryChannel.make_memory(payload)
        inherited.callback(os.close, memory_fd)
        ends = [inherited.enter_context(end).fileno() for end in socket.socketpair()]
        return (
            LinkSpec(peer=sender + 1, memory_fd=memory_fd, bell_fd=ends[0]),
            LinkSpec(peer=sender, memory_fd=memory_fd, bell_fd=ends[1]),
        )

    def _spawn(self, control_fd: int, links: Sequence[LinkSpec]) -> None:
        process = subprocess.Popen(
            [*WORKER_COMMAND, str(control_fd)],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if _has_fileno(sys.stderr) else subprocess.DEVNULL,
            pass_fds=[control_fd, *(fd for link in links for fd in link.inherited)],
        )
        self._processes.append(process)

    def _await_all(self, kind: type[Expected], doing: str, limit_seconds: float) -> list[Expected]:
        """One answer of each stage, all within `limit_seconds` from now."""
        answers: dict[int, Expected] = {}
        deadline = monotonic() + limit_seconds
        while len(answers) < len(self._specs):
            heard = self.hear(max(0.0, deadline - monotonic()))
            if not heard:
                missing = min(index for index in range(len(self._specs)) if index not in answers)
                self.silent(missing, doing, limit_seconds)
            for index, answer in heard:
                assert isinstance(answer, kind) and index not in answers, f"{type(answer).__name__} while {doing}"
                answers[index] = answer
        return [answers[index] for index in range(len(self._specs))]

    # -- ending ----------------------------------------------------------------------------------------------------

    def _lost(self, index: int) -> NoReturn:
        """Stage `index` closed its socket. The error names the stage that fell first: the others end because of it."""
        deadline = monotonic() + _SECONDS_TO_LEAVE
        codes = [_exit_code(process, max(0.0, deadline - monotonic())) for process in self._processes]
        first = next((i for i, code in enumerate(codes) if code not in (None, NEIGHBOUR_LOST)), index)
        if codes[first] is not None:
            self._raise_last_words(first)
        self.close()
        raise WorkerError(f"{self._name(first)} {_describe(codes[first])}")

    def _raise_last_words(self, index: int) -> None:
        """Raises what a worker that has ended said of its end, if it did."""
        try:
            while not isinstance(answer := self._controls[index].receive_answer(), Failed):
                pass
        except Closed:
            return
        self._failed(index, answer)

    def _failed(self, index: int, failed: Failed) -> NoReturn:
        self.close()
        raise failed.as_error(self._name(index))

    def _name(self, index: int) -> str:
        return f"the process of stage {index} of {len(self._specs)}"

    def _end_processes(self) -> None:
        for control in self._controls:
            control.close()
        for process in self._processes:
            process.kill()
            process.wait()


def _has_fileno(stream: object) -> bool:
    """Notebooks and test runners replace standard error by an object without a file."""
    try:
        stream.fileno()  # type: ignore[attr-defined]
    except (AttributeError, OSError):
        return False
    return True


def _exit_code(process: subprocess.Popen[bytes], timeout_seconds: float) -> int | None:
    try:
        return process.wait(timeout_seconds)
    except subprocess.TimeoutExpired:
        return None


def _describe(code: int | None) -> str:
    if code is None:
        return "closed its connection"
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
        return f"was ended by {name}{hint}"
    return f"ended with exit code {code}"
