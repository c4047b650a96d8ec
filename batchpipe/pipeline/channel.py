"""The way of hidden states from one stage's process to the next.

The receiver knows the number of tokens from its own copy of the step, so nothing but the payload travels
(structure-aware transmission, SiPipe, arXiv 2506.22033). On the CPU the payload stands in a ring of slots in memory
that both processes map, and a socket is the doorbell. Between GPUs, and where gloo is asked for, it is sent by
torch.distributed; a peer that does not answer is ended by the controller's limit on a step.
"""

from __future__ import annotations

import mmap
import os
import socket
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as distributed
from torch import Tensor

from batchpipe.pipeline.messages import Closed

NUM_SLOTS = 2
_BELL = b"\x01"


@dataclass(frozen=True, slots=True)
class Payload:
    """The largest hidden states of a step: [max_tokens, hidden_size] of `dtype`."""

    max_tokens: int
    hidden_size: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.max_tokens * self.hidden_size * self.dtype.itemsize


class Channel(Protocol):
    """One direction between two neighbours. Both ends raise `Closed` if the other one is gone."""

    def send(self, hidden: Tensor) -> None: ...

    def receive(self, num_tokens: int) -> Tensor:
        """[num_tokens, hidden_size]; valid until `release`."""

    def release(self) -> None:
        """The receiver does not read what `receive` returned any more."""


class SharedMemoryChannel:
    """A ring of `NUM_SLOTS` slots. Each end counts for itself; a byte on the socket says "filled", or back "free".

    The memory has no name (memfd), so nothing is left behind and the size of /dev/shm does not matter.
    """

    def __init__(self, memory_fd: int, bell: socket.socket, payload: Payload) -> None:
        self._payload = payload
        self._bell = bell
        self._map = mmap.mmap(memory_fd, NUM_SLOTS * payload.nbytes)
        slots = torch.frombuffer(self._map, dtype=payload.dtype)
        self._slots = slots.view(NUM_SLOTS, payload.max_tokens, payload.hidden_size)
        self._next = 0
        self._num_free = NUM_SLOTS

    @staticmethod
    def make_memory(payload: Payload) -> int:
        """A file descriptor of anonymous memory of the right size, for both ends to inherit."""
        memory_fd = os.memfd_create("batchpipe-channel")
        os.truncate(memory_fd, NUM_SLOTS * payload.nbytes)
        return memory_fd

    def pin(self) -> None:
        """So that a GPU copies at the link's speed. Where the system refuses, it copies by way of other memory."""
        torch.cuda.cudart().cudaHostRegister(self._slots.data_ptr(), self._slots.nbytes, 0)

    def send(self, hidden: Tensor) -> None:
        if self._num_free == 0:
            self._wait()
            self._num_free += 1
        self._slots[self._next, : hidden.shape[0]].copy_(hidden)
        self._num_free -= 1
        self._ring()
        self._next = (self._next + 1) % NUM_SLOTS

    def receive(self, num_tokens: int) -> Tensor:
        self._wait()
        return self._slots[self._next, :num_tokens]

    def release(self) -> None:
        self._next = (self._next + 1) % NUM_SLOTS
        self._ring()

    def _ring(self) -> None:
        try:
            self._bell.sendall(_BELL)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed from error

    def _wait(self) -> None:
        try:
            if not self._bell.recv(1):
                raise Closed
        except ConnectionResetError as error:
            raise Closed from error


class HostedChannel:
    """Between stages on GPUs that cannot reach each other: by way of the host's shared memory, pinned."""

    def __init__(self, channel: SharedMemoryChannel, payload: Payload, device: str) -> None:
        self._channel = channel
        self._buffer = torch.empty(payload.max_tokens, payload.hidden_size, dtype=payload.dtype, device=device)
        channel.pin()

    def send(self, hidden: Tensor) -> None:
        self._channel.send(hidden)

    def receive(self, num_tokens: int) -> Tensor:
        hidden = self._buffer[:num_tokens]
        hidden.copy_(self._channel.receive(num_tokens))
        self._channel.release()
        return hidden

    def release(self) -> None:
        """Does nothing: the next copy is queued on the same stream, behind the kernels that read the buffer."""


class DistributedChannel:
    """torch.distributed between ranks (NCCL between GPUs, gloo elsewhere); the rank of a stage is its index."""

    def __init__(self, peer: int, payload: Payload, device: str) -> None:
        self._peer = peer
        self._buffer = torch.empty(payload.max_tokens, payload.hidden_size, dtype=payload.dtype, device=device)

    def send(self, hidden: Tensor) -> None:
        try:
            distributed.send(hidden.contiguous(), self._peer)
        except RuntimeError as error:
            raise Closed from error

    def receive(self, num_tokens: int) -> Tensor:
        hidden = self._buffer[:num_tokens]
        try:
            distributed.recv(hidden, self._peer)
        except RuntimeError as error:
            raise Closed from error
        return hidden

    def release(self) -> None:
        """Does nothing: the next receive is queued on the same stream, behind the kernels that read the buffer."""
