"""What travels between the controller and its workers: MessagePack over a socket, arrays as their bytes. No pickle."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_origin

import msgspec
import numpy as np

from batchpipe.types import Int32Array, LinkUse, TokenLogprobs

Message = TypeVar("Message")
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A worker's first word: its weights are in place, or why they are not (an error class of `batchpipe.errors`)."""

    free_bytes: int = 0
    bytes_per_block: int = 0
    block_tokens: int = 0
    device_name: str = ""
    error: str | None = None
    error_message: str = ""


@dataclass(frozen=True, slots=True)
class Allocate:
    """The controller's answer: how many KV blocks every stage holds, see `Capacity`."""

    num_blocks: int
    num_host_blocks: int
    streams_per_block: int


@dataclass(frozen=True, slots=True)
class Allocated:
    """A worker has memory for KV, or why it has none (an error class of `batchpipe.errors`)."""

    error: str | None = None
    error_message: str = ""


@dataclass(frozen=True, slots=True)
class StageReport:
    """A stage has done a step; the last stage brings the tokens."""

    step_id: int
    seconds: float
    token_ids: Int32Array | None = None
    logprobs: dict[int, TokenLogprobs] | None = None
    link_use: LinkUse | None = None
    corrupt: dict[int, str] = field(default_factory=dict)


def merge_corrupt(stages: Iterable[Mapping[int, str]]) -> dict[int, str]:
    """What the stages of a step found wrong, by sequence id: the first stage's word where several found something."""
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
    """Whole messages over a stream socket."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end

    def send(self, message: object) -> None:
        data = encode(message)
        try:
            self.socket.sendall(_LENGTH.pack(len(data)) + data)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Closed from error

    def receive(self, kind: type[Message]) -> Message:
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return decode(self._read(length), kind)

    def close(self) -> None:
        self.socket.close()

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
