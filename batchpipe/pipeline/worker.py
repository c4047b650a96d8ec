"""The process of one stage: `python -m batchpipe.pipeline.worker`, started and fed by a `WorkerGroup`.

Its argument is the descriptor of the socket on which the controller sends a `WorkerSpec`. The worker loads, allocates,
and runs steps until its controller is gone. It dies with its parent, and leaves signals meant for the job to it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from queue import SimpleQueue
from time import perf_counter
from typing import Literal, NoReturn

import torch
import torch.distributed as distributed

from batchpipe.errors import BatchpipeError
from batchpipe.pipeline.channel import Channel, DistributedChannel, HostedChannel, Payload, SharedMemoryChannel
from batchpipe.pipeline.messages import Allocate, Allocated, Closed, Computed, Failed, Loaded, Sampled, Wire
from batchpipe.pipeline.stage import Stage, StageSpec, StepSampler, sampler_of
from batchpipe.pipeline.stopwatch import Stopwatch
from batchpipe.types import Step

FAILED = 1
NEIGHBOUR_LOST = 3  # the exit code of a worker that ends because another process did
_PR_SET_PDEATHSIG = 1

Transport = Literal["shared_memory", "gloo", "nccl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """One end of a channel: the peer's rank, and for shared memory the inherited file descriptors."""

    peer: int
    memory_fd: int | None = None
    bell_fd: int | None = None

    @property
    def inherited(self) -> tuple[int, ...]:
        return tuple(fd for fd in (self.memory_fd, self.bell_fd) if fd is not None)


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    stage: StageSpec
    parent_pid: int
    transport: Transport
    rendezvous: str  # where the ranks of torch.distributed meet: a file:// address
    incoming: LinkSpec | None
    outgoing: LinkSpec | None


def main(control_fd: int) -> int:
    control = Wire(socket.socket(fileno=control_fd))
    try:
        serve(control)
    except Closed:
        return NEIGHBOUR_LOST
    except Exception as error:
        control.send(Failed.of(error))
        if isinstance(error, BatchpipeError):
            return FAILED
        raise


def serve(control: Wire) -> NoReturn:
    """Loads, allocates and runs steps, until Closed says that the controller or a neighbour is gone."""
    spec = control.receive(WorkerSpec)
    die_with(spec.parent_pid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if spec.stage.cpus:
        os.sched_setaffinity(0, spec.stage.cpus)
    stage, sampler = Stage(spec.stage), sampler_of(spec.stage)
    control.send(Loaded(stage.free_bytes, stage.bytes_per_block, stage.block_tokens, stage.device_name))
    asked = control.receive(Allocate)
    stage.allocate(asked.num_blocks, asked.num_host_blocks, asked.streams_per_block)
    control.send(Allocated())
    incoming, outgoing = connect(spec, stage.dtype)
    inbox = Inbox(control, stage)
    while True:
        run_step(inbox.next_step(), control, stage, sampler, incoming, outgoing)


class Inbox:
    """Receives steps on a thread of its own, so that a step's transfers start while others are computed."""

    def __init__(self, control: Wire, stage: Stage) -> None:
        self._control = control
        self._stage = stage
        self._steps: SimpleQueue[Step | BaseException] = SimpleQueue()
        threading.Thread(target=self._listen, name="inbox", daemon=True).start()

    def next_step(self) -> Step:
        """In order. Raises Closed if the controller is gone."""
        step = self._steps.get()
        if isinstance(step, BaseException):
            raise step
        return step

    def _listen(self) -> None:
        try:
            while True:
                step = self._control.receive(Step)
                self._stage.announce(step)
                self._steps.put(step)
        except BaseException as error:  # raised by `next_step`
            self._steps.put(error)


def run_step(
    step: Step,
    control: Wire,
    stage: Stage,
    sampler: StepSampler | None,
    incoming: Channel | None,
    outgoing: Channel | None,
) -> None:
    hidden = None if incoming is None else incoming.receive(len(step.token_ids))
    watch = Stopwatch(stage.spec.device)
    output = stage.run(step, hidden)
    watch.stop()
    if incoming is not None:
        incoming.release()
    if sampler is not None:
        started = perf_counter()
        tokens = sampler.sample_step(step, output)
        sampled = Sampled(step.step_id, perf_counter() - started, tokens.token_ids, tokens.logprobs)
        control.send(_computed(step, stage, watch), sampled)
    else:
        assert outgoing is not None
        outgoing.send(output)
        control.send(_computed(step, stage, watch))


def _computed(step: Step, stage: Stage, watch: Stopwatch) -> Computed:
    return Computed(step.step_id, watch.seconds(), stage.link_use, stage.corrupt)


def connect(spec: WorkerSpec, dtype: torch.dtype) -> tuple[Channel | None, Channel | None]:
    payload = Payload(spec.stage.max_step_tokens, spec.stage.hidden_size, dtype)
    if spec.transport != "shared_memory":
        distributed.init_process_group(
            spec.transport,
            init_method=spec.rendezvous,
            rank=spec.stage.index,
            world_size=spec.stage.num_stages,
        )

    def channel(link: LinkSpec | None) -> Channel | None:
        if link is None:
            return None
        if link.memory_fd is not None:
            shared = SharedMemoryChannel(link.memory_fd, socket.socket(fileno=link.bell_fd), payload)
            return shared if spec.stage.device == "cpu" else HostedChannel(shared, payload, spec.stage.device)
        return DistributedChannel(link.peer, payload, spec.stage.device)

    return channel(spec.incoming), channel(spec.outgoing)


def die_with(parent_pid: int) -> None:
    """Asks the kernel to kill this process when its parent ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit(NEIGHBOUR_LOST)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
