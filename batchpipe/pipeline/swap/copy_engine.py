"""The link between the two tiers of KV: a copy engine per direction, a thread that runs the most urgent transfer.

    compute ──record──▶ TransferEvent ──after──▶ CopyEngine (host to device) ──record──▶ TransferEvent ──wait──▶ compute
                                                 CopyEngine (device to host)

On a GPU a copy engine has streams of its own and events are CUDA events. "Recorded" then means that the work before the
event is queued, so neither computing nor a copy engine stops for the other if the GPU can wait by itself. On the CPU
the threads copy, and "recorded" means done.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from time import perf_counter, sleep
from typing import Any, Literal

import torch

_SECONDS_TO_END = 30.0


@dataclass(frozen=True, slots=True)
class Fault:
    """A transfer of step `step_id` that goes wrong, to test that it is found.

    flipped: a bit of the step's `number`-th new token changes on the host after it is stored. wrong_source,
    wrong_target: the `number`-th load copies from, or to, the next block instead. late: it counts as done before it is,
    and is copied after the step.
    """

    kind: Literal["flipped", "wrong_source", "wrong_target", "late"]
    step_id: int
    number: int = 0


@dataclass(frozen=True, slots=True)
class EmulatedLink:
    """A link of a given speed, None for any, for tests and measurements on a machine whose tiers are one memory.

    Bytes are copied at the end of the time that they take, as they would arrive.
    """

    load_bytes_per_second: float | None = None
    store_bytes_per_second: float | None = None
    faults: tuple[Fault, ...] = ()


class TransferEvent:
    """A moment in the work of the device or the link: others wait for it, and time is measured between two.

    "The current stream" is the calling thread's on the event's device. On the CPU nothing is ever queued.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_recorded = False
        self._device = device
        self._seconds = 0.0
        on_gpu = device.type == "cuda"
        self._event: Any = torch.cuda.Event(enable_timing=True, blocking=True) if on_gpu else None

    def record(self) -> None:
        """Puts the event behind all work so far: on a GPU behind that of the current stream."""
        if self._event is None:
            self._seconds = perf_counter()
        else:
            self._event.record(torch.cuda.current_stream(self._device))
        self.is_recorded = True

    def hold_stream(self) -> None:
        """The current stream does its later work after the event, which must be recorded."""
        if self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)

    def synchronize(self) -> None:
        """Sleeps until the GPU has reached the event, which must be recorded."""
        if self._event is not None:
            self._event.synchronize()

    @property
    def is_reached(self) -> bool:
        return self.is_recorded and (self._event is None or bool(self._event.query()))

    def seconds_since(self, earlier: TransferEvent) -> float:
        """Both events are reached."""
        if self._event is None:
            return self._seconds - earlier._seconds
        return float(earlier._event.elapsed_time(self._event)) / 1e3


@dataclass(slots=True)
class Transfer:
    """Work for a copy engine, runnable once all events in `after` are recorded. The engine records `begun` and `done`.

    urgency: among runnable transfers the smallest runs first. patient: the thread waits for the end of the transfer and
    then picks the most urgent; after others, which are only queued, it goes on at once.
    """

    work: Callable[[], None]
    num_bytes: int
    after: Sequence[TransferEvent]
    begun: TransferEvent
    done: TransferEvent
    urgency: tuple[int, ...]
    patient: bool = True


class CopyEngine:
    """One direction of the link: a thread that sleeps until a transfer is runnable."""

    def __init__(self, link: Link, name: str, bytes_per_second: float | None) -> None:
        self._link = link
        self._bytes_per_second = bytes_per_second
        self._busy_until = 0.0
        self._woken = threading.Condition(link.lock)
        self._awaited: set[TransferEvent] = set()  # of each waiting transfer the first event that is not recorded
        self._waiting: list[Transfer] = []  # the most urgent first
        self._thread = threading.Thread(target=self._run, name=f"kv-{name}", daemon=True)
        self._thread.start()

    def put(self, transfers: Iterable[Transfer]) -> None:
        """Transfers of equal urgency run in the order in which they were put."""
        with self._link.lock:
            self._waiting += transfers
            self._waiting.sort(key=attrgetter("urgency"))
            self._woken.notify()

    def wake(self, event: TransferEvent | None = None) -> None:
        """Call with the lock held, after recording `event` or closing the link."""
        if event is None or event in self._awaited:
            self._woken.notify()

    def join(self) -> bool:
        """False if the thread does not end."""
        self._thread.join(_SECONDS_TO_END)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            streams = {patient: self._link.new_stream() for patient in (True, False)}
            while (transfer := self._next()) is not None:
                with torch.cuda.stream(streams[transfer.patient]):  # does nothing on the CPU
                    self._do(transfer)
        except BaseException as error:  # raised again where the stage waits
            self._link.fail(error)

    def _next(self) -> Transfer | None:
        """Sleeps until a transfer is runnable; None if the link is closed."""
        with self._link.lock:
            while not self._link.is_closed:
                self._awaited.clear()
                for index, transfer in enumerate(self._waiting):
                    awaited = next((event for event in transfer.after if not event.is_recorded), None)
                    if awaited is None:
                        del self._waiting[index]
                        return transfer
                    self._awaited.add(awaited)
                self._woken.wait()
                self._busy_until = max(self._busy_until, perf_counter())
        return None

    def _do(self, transfer: Transfer) -> None:
        for event in transfer.after:
            event.hold_stream()
        transfer.begun.record()
        if self._bytes_per_second is not None:
            self._busy_until += transfer.num_bytes / self._bytes_per_second
            sleep(max(0.0, self._busy_until - perf_counter()))
        transfer.work()
        self._link.record(transfer.done)
        if transfer.patient:
            transfer.done.synchronize()


class Link:
    """Both directions between one stage's device and its host memory. `wait` raises what failed in a copy engine."""

    def __init__(self, device: torch.device, emulated: EmulatedLink | None) -> None:
        speeds = emulated or EmulatedLink()
        self.device = device
        self.lock = threading.Lock()
        self.is_closed = False
        self._changed = threading.Condition(self.lock)
        self._failure: BaseException | None = None
        self.loads = CopyEngine(self, "loads", speeds.load_bytes_per_second)
        self.stores = CopyEngine(self, "stores", speeds.store_bytes_per_second)
        self._engines = (self.loads, self.stores)

    def new_event(self) -> TransferEvent:
        return TransferEvent(self.device)

    def record(self, event: TransferEvent) -> None:
        """Puts the event behind the work of the calling thread, and wakes what waits for it."""
        with self.lock:
            event.record()
            self._changed.notify_all()
            for engine in self._engines:
                engine.wake(event)

    def wait(self, event: TransferEvent) -> None:
        """The calling thread does its later work after the event."""
        with self.lock:
            self._changed.wait_for(lambda: event.is_recorded or self._failure is not None)
        if self._failure is not None:
            raise self._failure
        event.hold_stream()

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

    def close(self) -> bool:
        """Ends the threads; a transfer that has not begun is dropped. False if a thread is stuck in its transfer."""
        with self.lock:
            self.is_closed = True
            for engine in self._engines:
                engine.wake()
        ended = [engine.join() for engine in self._engines]
        return all(ended)
