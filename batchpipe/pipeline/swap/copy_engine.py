"""The link between the two tiers of KV: a thread a direction, which does what may begin, the most urgent first.

    compute   ──set──▶ TransferEvent ──after──▶ CopyEngine (host to device) ──set──▶ TransferEvent ──wait──▶ compute
                                       CopyEngine (device to host)

On a GPU a lane has a stream of its own: marks are events there, and "set" means that the work before it is queued, so
neither computing nor a lane stops for the other where the GPU can wait by itself. On the CPU the threads copy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from operator import attrgetter
from time import perf_counter, sleep
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from batchpipe.native.build import load_kernels
from batchpipe.types import Int32Array

_SECONDS_TO_END = 30.0


@dataclass(frozen=True, slots=True)
class Fault:
    """A transfer of step `step_id` that goes wrong, to see that it is found.

    flipped: after the step's `number`-th new token is stored, a bit of it on the host changes. wrong_source,
    wrong_target: the `number`-th load copies from, or to, the next block instead. late: it counts as done before it is,
    and is copied after the step.
    """

    kind: Literal["flipped", "wrong_source", "wrong_target", "late"]
    step_id: int
    number: int = 0


@dataclass(frozen=True, slots=True)
class EmulatedLink:
    """For tests and measurements on a machine whose tiers are one memory: a link of a given speed; None: any.

    What it carries is copied last, when it may arrive: no earlier, as a link would.
    """

    load_bytes_per_second: float | None = None
    store_bytes_per_second: float | None = None
    faults: tuple[Fault, ...] = ()


class TransferEvent:
    """A moment in what the device or the link does: others wait for it, and time is measured between two.

    "The current stream" is the calling thread's on the mark's device; on the CPU there is none, nor anything queued.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_set = False
        self._device = device
        self._seconds = 0.0
        on_gpu = device.type == "cuda"
        self._event: Any = torch.cuda.Event(enable_timing=True, blocking=True) if on_gpu else None

    def record(self) -> None:
        """Puts the mark behind all work so far: on a GPU behind that of the current stream."""
        if self._event is None:
            self._seconds = perf_counter()
        else:
            self._event.record(torch.cuda.current_stream(self._device))
        self.is_set = True

    def order(self) -> None:
        """What the current stream does from now on comes after the mark, which must be set."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)

    def synchronize(self) -> None:
        """Sleeps until the GPU has come to the mark, which must be set."""
        if self._event is not None:
            self._event.synchronize()

    @property
    def is_reached(self) -> bool:
        return self.is_set and (self._event is None or bool(self._event.query()))

    def seconds_since(self, earlier: TransferEvent) -> float:
        """Both reached."""
        if self._event is None:
            return self._seconds - earlier._seconds
        return float(earlier._event.elapsed_time(self._event)) / 1e3


@dataclass(slots=True)
class Transfer:
    """One piece of work of a lane, once all of `after` is set. `begun` and `done` are the lane's to set.

    urgency: of what may begin the smallest is first. patient: its lane waits for its end before it does the next, which
    then is the most urgent at that time.
    """

    work: Callable[[], None]
    num_bytes: int
    after: Sequence[TransferEvent]
    begun: TransferEvent
    done: TransferEvent
    urgency: tuple[int, ...]
    patient: bool = True


class CopyEngine:
    """One direction of the link: a thread that sleeps until something may begin."""

    def __init__(self, link: Link, name: str, bytes_per_second: float | None) -> None:
        self._link = link
        self._bytes_per_second = bytes_per_second
        self._busy_until = 0.0
        self._woken = threading.Condition(link.lock)
        self._awaited: set[TransferEvent] = set()  # of each that waits, the first mark that is not set
        self._waiting: list[Transfer] = []  # the most urgent first
        self._thread = threading.Thread(target=self._run, name=f"kv-{name}", daemon=True)
        self._thread.start()

    def put(self, transfers: Iterable[Transfer]) -> None:
        """Of equal urgency those that were put first are first."""
        with self._link.lock:
            self._waiting += transfers
            self._waiting.sort(key=attrgetter("urgency"))
            self._woken.notify()

    def wake(self, mark: TransferEvent | None = None) -> None:
        """For who holds the lock: the mark is set, or the link is closed."""
        if mark is None or mark in self._awaited:
            self._woken.notify()

    def join(self) -> None:
        self._thread.join(_SECONDS_TO_END)
        assert not self._thread.is_alive(), "a copy thread does not end"

    def _run(self) -> None:
        try:
            streams = {patient: self._link.new_stream() for patient in (True, False)}
            while (transfer := self._next()) is not None:
                with torch.cuda.stream(streams[transfer.patient]):  # nothing on the CPU
                    self._do(transfer)
        except BaseException as error:  # raised again where the stage waits
            self._link.fail(error)

    def _next(self) -> Transfer | None:
        """Sleeps until one may begin; None: the link is closed."""
        with self._link.lock:
            while not self._link.is_closed:
                self._awaited.clear()
                for index, transfer in enumerate(self._waiting):
                    awaited = next((mark for mark in transfer.after if not mark.is_set), None)
                    if awaited is None:
                        del self._waiting[index]
                        return transfer
                    self._awaited.add(awaited)
                self._woken.wait()
                self._busy_until = max(self._busy_until, perf_counter())
        return None

    def _do(self, transfer: Transfer) -> None:
        for mark in transfer.after:
            mark.order()
        transfer.begun.record()
        if self._bytes_per_second is not None:
            self._busy_until += transfer.num_bytes / self._bytes_per_second
            sleep(max(0.0, self._busy_until - perf_counter()))
        transfer.work()
        self._link.set(transfer.done)
        if transfer.patient:
            transfer.done.synchronize()


class Link:
    """Both directions between one stage's device and its host memory. A failure of a lane is raised by `wait`."""

    def __init__(self, device: torch.device, emulated: EmulatedLink | None) -> None:
        speeds = emulated or EmulatedLink()
        self.device = device
        self.lock = threading.Lock()
        self.is_closed = False
        self._changed = threading.Condition(self.lock)
        self._failure: BaseException | None = None
        self.loads = CopyEngine(self, "loads", speeds.load_bytes_per_second)
        self.stores = CopyEngine(self, "stores", speeds.store_bytes_per_second)
        self._lanes = (self.loads, self.stores)

    def mark(self) -> TransferEvent:
        return TransferEvent(self.device)

    def set(self, mark: TransferEvent) -> None:
        """Puts the mark behind the work of the calling thread."""
        with self.lock:
            mark.record()
            self._changed.notify_all()
            for lane in self._lanes:
                lane.wake(mark)

    def wait(self, mark: TransferEvent) -> None:
        """What the calling thread does from now on comes after the mark."""
        with self.lock:
            self._changed.wait_for(lambda: mark.is_set or self._failure is not None)
        if self._failure is not None:
            raise self._failure
        mark.order()

    def fail(self, error: BaseException) -> None:
        with self.lock:
            self._failure = error
            self._changed.notify_all()

    def new_stream(self) -> torch.cuda.Stream | None:
        """For the calling thread, which works on this link's device from now on; None on the CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.set_device(self.device)
        return torch.cuda.Stream(self.device)

    def close(self) -> None:
        """Ends the threads; what has not begun is not done."""
        with self.lock:
            self.is_closed = True
            for lane in self._lanes:
                lane.wake()
        self.loads.join()
        self.stores.join()


def copy_bytes(target: Tensor, source: Tensor) -> None:
    """uint8, contiguous, of one size. On a GPU queued on the current stream; on the CPU by the calling thread alone."""
    if target.is_cuda or source.is_cuda:
        target.copy_(source, non_blocking=True)
    else:
        np.copyto(target.numpy(), source.numpy())


def copy_pieces(targets: Tensor, to: Int32Array, sources: Tensor, of: Int32Array) -> None:
    """Piece of[i] of `sources` to place to[i] of `targets`, uint8 [N, bytes], pieces contiguous; see `copy_bytes`."""
    assert to.max(initial=0) < len(targets) and of.max(initial=0) < len(sources), "a piece of nowhere"
    kernels = None if targets.is_cuda or sources.is_cuda else load_kernels()
    if kernels is None:
        for target, source in zip(to.tolist(), of.tolist(), strict=True):
            copy_bytes(targets[target], sources[source])
        return
    target_numbers, source_numbers = to.astype(np.int64), of.astype(np.int64)
    copy = kernels.batchpipe_copy_pieces
    copy.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int64]
    copy.restype = None
    copy(
        targets.data_ptr(),
        target_numbers.ctypes.data,
        targets.stride(0),
        sources.data_ptr(),
        source_numbers.ctypes.data,
        sources.stride(0),
        len(target_numbers),
        targets.shape[1],
    )
