"""What travels between the controller and its workers: MessagePack over a socket, arrays as their bytes. No pickle.

The controller sends a worker its `WorkerSpec`, then `Allocate`, then `Step`s. A worker answers with `Loaded`,
`Allocated`, and for every step `Computed` and from the last stage `Sampled`; or at any time with `Failed`, its end.
"""

from __future__ import annotations

import socket
import struct
import traceback
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_origin

import msgspec
import numpy as np

from batchpipe.errors import BatchpipeError, JobError, MemoryLimitError, ModelError, WorkerError
from batchpipe.types import Int32Array, LinkUse, TokenLogprobs

Message = TypeVar("Message")
_LENGTH = struct.Struct("<I")
_TRACEBACK_LINES = 12
# Errors that keep their type, and so their exit code, on the way from a worker to the controller.
_USER_ERRORS: dict[str, type[BatchpipeError]] = {
    kind.__name__: kind for kind in (JobError, ModelError, MemoryLimitError)
}


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The worker's weights are in place. See `StageMemory` for the numbers."""

    free_bytes: int
    bytes_per_block: int
    block_tokens: int
    device_name: str


class Allocate(msgspec.Struct, frozen=True, tag=True):
    """How many KV blocks every stage holds, see `Capacity`."""

    num_blocks: int
    num_host_blocks: int
    streams_per_block: int


class Allocated(msgspec.Struct, frozen=True, tag=True):
    """The worker has memory for its KV."""


class Computed(msgspec.Struct, frozen=True, tag=True):
    """A stage has hidden states or logits of a step. See `StepResult` for `link_use` and `corrupt`."""

    step_id: int
    seconds: float
    link_use: LinkUse | None = None
    corrupt: dict[int, str] = {}


class Sampled(msgspec.Struct, frozen=True, tag=True):
    """The sampler behind the last stage has a step's tokens, see `StepResult`."""

    step_id: int
    seconds: float
    token_ids: Int32Array
    logprobs: dict[int, TokenLogprobs]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The error that ends a worker. `kind` names one of the user's errors; an empty one means the fault is ours."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> Failed:
        kind = type(error).__name__
        if kind in _USER_ERRORS:
            return cls(kind, str(error))
        lines = "".join(traceback.format_exception(error)).splitlines()
        return cls("", "\n".join(lines[-_TRACEBACK_LINES:]))

    def as_error(self, worker: str) -> BatchpipeError:
        """worker: names the process in the WorkerError that stands for a fault of ours."""
        if not self.kind:
            return WorkerError(f"{worker} failed; the end of its traceback:\n{self.message}")
        assert self.kind in _USER_ERRORS, f"a worker sent an error of unknown kind {self.kind}"
        return _USER_ERRORS[self.kind](self.message)


Answer = Loaded | Allocated | Computed | Sampled | Failed


def merge_corrupt(stages: Iterable[Mapping[int, str]]) -> dict[int, str]:
    """What the stages found wrong in a step, by sequence id; of several findings the first stage's is kept."""
    merged: dict[int, str] = {}
    for corrupt in stages:
        merged = {**corrupt, **merged}
    return merged


class Closed(Exception):
    """The other end is gone."""


def encode(message: object) -> bytes:
    return _ENCODER.encode(message)


def decode(data: bytes, kind: type[Message]) -> Message:
    return msgspec.msgpack.decode(data, type=kind, dec_hook=_to_array)


class Wire:
    """Whole messages over a stream socket. Both directions raise Closed if the other end is gone."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end

    def send(self, *messages: object) -> None:
        """In one piece, so that the receiver is woken once."""
        parts = [encode(message) for message in messages]
        try:
            self.socket.sendall(b"".join(_LENGTH.pack(len(part)) + part for part in parts))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed from error

    def receive(self, kind: type[Message]) -> Message:
        return decode(self._read_message(), kind)

    def receive_answer(self) -> Answer:
        return _ANSWER_DECODER.decode(self._read_message())

    def close(self) -> None:
        self.socket.close()

    def _read_message(self) -> bytes:
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return self._read(length)

    def _read(self, num_bytes: int) -> bytes:
        data = bytearray()
        while len(data) < num_bytes:
            try:
                piece = self.socket.recv(num_bytes - len(data))
            except ConnectionResetError as error:
                raise Closed from error
            if not piece:
                raise Closed
            data += piece
        return bytes(data)


def _from_array(value: Any) -> Any:
    assert isinstance(value, np.ndarray), f"no message holds a {type(value).__name__}"
    return (value.dtype.str, value.shape, value.tobytes())


def _to_array(kind: type, value: Any) -> Any:
    assert get_origin(kind) is np.ndarray or kind is np.ndarray
    dtype, shape, data = value
    return np.frombuffer(data, dtype=dtype).reshape(shape).copy()


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_from_array)
_ANSWER_DECODER: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer, dec_hook=_to_array)
