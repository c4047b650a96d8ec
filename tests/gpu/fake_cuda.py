"""A GPU's runtime on the CPU: streams, events, memory and graphs, for the code that calls them.

Kernels run in Triton's interpreter, everything else on the CPU at once. A graph is honest: it replays each operation
on the memory that it was recorded with, so it sees new inputs only where the code left them; what it computed while it
was recorded is thrown away; and what a recording forbids (looking at a number, copying one in) is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from time import perf_counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from tests.gpu import interpreter  # isort: skip
from triton.runtime.interpreter import GridExecutor

FORBIDDEN = {"aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero"}
GARBAGE = 77


def storages(values: Any) -> set[int]:
    return {one.untyped_storage().data_ptr() for one in tree_leaves(values) if isinstance(one, torch.Tensor)}


class Recording(TorchDispatchMode):
    """Does each operation that a GPU would launch a kernel for and notes it, to be done again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work: list[Callable[[], object]] = []
        self.names: list[str] = []
        self.made: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        output = func(*args, **kwargs)
        before = storages((args, kwargs))
        made = [one for one in tree_leaves(output) if isinstance(one, torch.Tensor)]
        is_view = storages(made) <= before and not func._schema.is_mutable
        if not is_view and not name.startswith(("aten::empty", "aten::new_empty")):
            fresh = not storages(made) <= before
            self.work.append(lambda: _again(func, args, kwargs, made if fresh else []))
            self.names.append(name)
        if not storages(made) <= before:
            self.made += made
        return output

    def launched(self, launch: Callable[[], object], name: str) -> None:
        with _disable_current_modes():
            launch()
        self.work.append(launch)
        self.names.append(name)


def _again(func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> None:
    computed = [one for one in tree_leaves(func(*args, **kwargs)) if isinstance(one, torch.Tensor)]
    for into, new in zip(outputs, computed, strict=bool(outputs)):
        into.copy_(new)


class FakeEvent:
    """Reached at once."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.at: float | None = None

    def record(self, stream: object = None) -> None:
        self.at = perf_counter()

    def synchronize(self) -> None:
        assert self.at is not None, "a wait for what was never recorded"

    def query(self) -> bool:
        return self.at is not None

    def elapsed_time(self, later: FakeEvent) -> float:
        assert self.at is not None and later.at is not None
        return 1e3 * (later.at - self.at)


class FakeStream:
    def __init__(self, device: object = None) -> None:
        pass

    def wait_stream(self, stream: FakeStream) -> None:
        pass

    def wait_event(self, event: FakeEvent) -> None:
        event.synchronize()

    def synchronize(self) -> None:
        pass


class FakeGraph:
    made: list[FakeGraph] = []

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        self.recording = Recording()
        self.num_replays = 0
        self.recording.__enter__()  # type: ignore[no-untyped-call]
        recordings.append(self.recording)

    def capture_end(self) -> None:
        if recordings and recordings[-1] is self.recording:
            recordings.pop()
            self.recording.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            FakeGraph.made.append(self)
            for one in self.recording.made:
                one.fill_(GARBAGE)

    def replay(self) -> None:
        self.num_replays += 1
        for one in self.recording.work:
            one()


recordings: list[Recording] = []


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeGraph]]:
    """The graphs that are recorded meanwhile."""
    if interpreter.DEVICE.type == "cuda":
        pytest.skip("there is a real one")
    the_stream = FakeStream()
    launch = GridExecutor.__call__

    def launched(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
        if recordings:
            recordings[-1].launched(lambda: launch(executor, *args, **kwargs), executor.fn.__name__)
        else:
            launch(executor, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", launched)
    for name, stand_in in {
        "Event": FakeEvent,
        "Stream": FakeStream,
        "CUDAGraph": FakeGraph,
        "current_stream": lambda device=None: the_stream,
        "stream": lambda stream: nullcontext(),
        "graph_pool_handle": lambda: (0, 0),
        "set_device": lambda device: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: None,
        "get_device_name": lambda device=None: "a card of the tests",
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    FakeGraph.made = []
    yield FakeGraph.made
    assert not recordings, "a recording was not ended"
