"""A process per stage: the controller sends every step to all stages and hears from all of them.

            controller (no device context)
   Step  │          │ Step        ▲ tokens of the oldest step, seconds of every stage
         ▼          ▼             │
      stage 0 ─▶ stage 1 ─▶ ... stage S-1

Every stage runs its steps in the order they were sent. A stage that dies closes its socket, which wakes the controller;
one that says nothing for `STEP_TIMEOUT_SECONDS` counts as lost. Either way all workers are ended and WorkerError names
the stage; `restart` starts new ones.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

from batchpipe import errors
from batchpipe.pipeline.channel import Payload, SharedMemoryChannel
from batchpipe.pipeline.memory import StageMemory
from batchpipe.pipeline.messages import Allocate, Allocated, Closed, Loaded, StageReport, Wire, encode, merge_corrupt
from batchpipe.pipeline.stage import StageSpec
from batchpipe.pipeline.worker import NEIGHBOUR_LOST, LinkSpec, Transport, WorkerSpec
from batchpipe.types import Capacity, Step, StepResult

STEP_TIMEOUT_SECONDS = 600.0
_SECONDS_TO_LEAVE = 2.0


class MultiprocessPipeline:
    """`capacity_of` turns what the loaded stages report into the capacity to offer.

    transport: `shared_memory` between processes of one host, `nccl` between GPUs, `gloo` where neither can be had.
    """

    def __init__(
        self,
        specs: Sequence[StageSpec],
        capacity_of: Callable[[Sequence[StageMemory]], Capacity],
        transport: Transport = "shared_memory",
    ) -> None:
        assert len(specs) > 0
        self._specs = specs
        self._transport = transport
        self.step_timeout_seconds = STEP_TIMEOUT_SECONDS
        self._processes: list[subprocess.Popen[bytes]] = []
        self._controls: list[Wire] = []
        self._reports: list[deque[StageReport]] = []
        self._in_flight: deque[int] = deque()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._capacity_of = capacity_of
        try:
            self._start()
        except BaseException:
            self._stop()
            raise

    def load(self) -> None:
        """Waits until every stage has loaded its layers, and gives them their KV. Once, before the first step.

        Apart from starting them, so that the replicas of one model load side by side.
        """
        try:
            self.capacity = self._capacity_of(self._await_loaded())
            self._allocate()
        except BaseException:
            self._stop()
            raise

    def __enter__(self) -> MultiprocessPipeline:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop()

    @property
    def worker_pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def submit(self, step: Step) -> None:
        assert len(self._in_flight) < self.capacity.max_in_flight, "more steps in flight than the pipeline holds"
        self._in_flight.append(step.step_id)
        for index, control in enumerate(self._controls):
            try:
                control.send(step)
            except Closed:
                self._lost(index)

    def collect(self) -> StepResult:
        step_id = self._in_flight[0]
        while not all(self._reports):
            if not self._hear(self.step_timeout_seconds):
                self._silent()
        self._in_flight.popleft()
        reports = [queue.popleft() for queue in self._reports]
        last = reports[-1]
        assert all(report.step_id == step_id for report in reports), "stages are out of step"
        assert last.token_ids is not None and last.logprobs is not None
        return StepResult(
            step_id,
            last.token_ids,
            last.logprobs,
            tuple(report.seconds for report in reports),
            tuple(report.link_use for report in reports if report.link_use is not None),
            merge_corrupt(report.corrupt for report in reports),
        )

    @property
    def sockets(self) -> list[socket.socket]:
        return [control.socket for control in self._controls]

    def ready(self) -> bool:
        while not all(self._reports) and self._hear(0.0):
            pass
        return all(self._reports)

    def restart(self) -> None:
        self._stop()
        self._start()
        self._await_loaded()
        self._allocate()

    # -- the workers' lives --------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Starts all workers side by side. A worker dies with the thread that started it."""
        self._in_flight.clear()
        self.device_names: tuple[str, ...] = ()
        self._reports = [deque() for _ in self._specs]
        self._folder = tempfile.TemporaryDirectory(prefix="batchpipe-")
        links = [self._make_link(sender) for sender in range(len(self._specs) - 1)]
        for index, spec in enumerate(self._specs):
            incoming = links[index - 1][1] if index > 0 else None
            outgoing = links[index][0] if index < len(links) else None
            self._spawn(spec, incoming, outgoing)
        for fd in {fd for link in links for end in link for fd in end.inherited}:
            os.close(fd)

    def _make_link(self, sender: int) -> tuple[LinkSpec, LinkSpec]:
        """The sending and the receiving end between stage `sender` and the next."""
        if self._transport != "shared_memory":
            return LinkSpec(peer=sender + 1), LinkSpec(peer=sender)
        spec = self._specs[sender]
        payload = Payload(spec.max_step_tokens, spec.hidden_size, getattr(torch, spec.dtype))
        memory_fd = SharedMemoryChannel.make_memory(payload)
        ends = socket.socketpair()
        return (
            LinkSpec(peer=sender + 1, memory_fd=memory_fd, bell_fd=ends[0].detach()),
            LinkSpec(peer=sender, memory_fd=memory_fd, bell_fd=ends[1].detach()),
        )

    def _spawn(self, spec: StageSpec, incoming: LinkSpec | None, outgoing: LinkSpec | None) -> None:
        assert self._folder is not None
        ours, theirs = socket.socketpair()
        worker = WorkerSpec(
            stage=spec,
            parent_pid=os.getpid(),
            control_fd=theirs.fileno(),
            transport=self._transport,
            rendezvous=f"file://{self._folder.name}/rendezvous",
            incoming=incoming,
            outgoing=outgoing,
        )
        fds = [
            theirs.fileno(),
            *(incoming.inherited if incoming else ()),
            *(outgoing.inherited if outgoing else ()),
        ]
        process = subprocess.Popen(
            [sys.executable, "-m", "batchpipe.pipeline.worker"],
            stdin=subprocess.PIPE,
            stdout=sys.stderr.fileno() if _has_fileno(sys.stderr) else subprocess.DEVNULL,
            pass_fds=fds,
        )
        theirs.close()
        self._processes.append(process)
        self._controls.append(Wire(ours))
        assert process.stdin is not None
        with process.stdin as stdin:
            stdin.write(encode(worker))

    def _await_loaded(self) -> list[StageMemory]:
        return [self._await_stage(index) for index in range(len(self._specs))]

    def _await_stage(self, index: int) -> StageMemory:
        try:
            loaded = self._controls[index].receive(Loaded)
        except Closed:
            self._lost(index)
        if loaded.error is not None:
            raise getattr(errors, loaded.error)(loaded.error_message)
        self.device_names += (loaded.device_name,)
        return StageMemory(loaded.free_bytes, loaded.bytes_per_block, loaded.block_tokens)

    def _allocate(self) -> None:
        capacity = self.capacity
        word = Allocate(capacity.num_blocks, capacity.num_host_blocks, capacity.streams_per_block)
        for index, control in enumerate(self._controls):
            try:
                control.send(word)
            except Closed:
                self._lost(index)
        for index, control in enumerate(self._controls):
            try:
                allocated = control.receive(Allocated)
            except Closed:
                self._lost(index)
            if allocated.error is not None:
                raise getattr(errors, allocated.error)(allocated.error_message)

    def _hear(self, timeout_seconds: float) -> bool:
        """Waits for a word of any worker and takes it in; False where none came in time."""
        readable, _, _ = select.select(self.sockets, [], [], timeout_seconds)
        for index, control in enumerate(self._controls):
            if control.socket in readable:
                try:
                    self._reports[index].append(control.receive(StageReport))
                except Closed:
                    self._lost(index)
        return bool(readable)

    def _silent(self) -> NoReturn:
        silent = min(index for index, queue in enumerate(self._reports) if not queue)
        self._stop()
        seconds = f"{self.step_timeout_seconds:.0f} s"
        raise errors.WorkerError(f"stage {silent} of {len(self._specs)} said nothing for {seconds}")

    def _lost(self, index: int) -> NoReturn:
        """A worker's socket is closed. Names the one that fell first: its neighbours end with NEIGHBOUR_LOST."""
        codes = [_exit_code(process) for process in self._processes]
        first = next((i for i, code in enumerate(codes) if code not in (None, NEIGHBOUR_LOST)), index)
        self._stop()
        how = _describe(codes[first])
        raise errors.WorkerError(f"the process of stage {first} of {len(self._specs)} {how}")

    def _stop(self) -> None:
        for control in self._controls:
            control.close()
        for process in self._processes:
            process.kill()
            process.wait()
        self._controls.clear()
        self._processes.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _has_fileno(stream: object) -> bool:
    """Notebooks and test runners replace standard error by an object without a file."""
    try:
        stream.fileno()  # type: ignore[attr-defined]
    except (AttributeError, OSError):
        return False
    return True


def _exit_code(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(_SECONDS_TO_LEAVE)
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
