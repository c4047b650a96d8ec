"""Starting, waiting for and losing workers, with small programs in the place of workers, and a real one that fails."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from batchpipe.errors import BatchpipeError, ModelError, WorkerError
from batchpipe.kv.layout import KvLayout
from batchpipe.pipeline import workers
from batchpipe.pipeline.memory import StageMemory
from batchpipe.pipeline.multiprocess import MultiprocessPipeline
from batchpipe.pipeline.stage import StageSpec
from batchpipe.pipeline.worker import LinkSpec
from batchpipe.pipeline.workers import Limits
from batchpipe.types import Capacity, Step
from tests.pipeline.test_engine_sameness import open_tiny

# A worker without a model. Its behaviour is the name of its stage's model folder.
PROGRAM = """
import socket, sys, time
import numpy as np
from batchpipe.errors import ModelError
from batchpipe.pipeline.messages import Allocated, Computed, Failed, Loaded, Sampled, Wire

wire = Wire(socket.socket(fileno=int(sys.argv[1])))
stage = wire.receive(dict)["stage"]
behaviour = stage["model_folder"].rpartition("/")[2]
if behaviour == "hangs-loading" and stage["index"] == 0:
    time.sleep(600)
if behaviour == "cannot-load":
    wire.send(Failed.of(ModelError("there are no weights")))
    sys.exit(1)
wire.send(Loaded(1 << 30, 0, 16, "fake"))
wire.receive(dict)
if behaviour == "hangs-allocating":
    time.sleep(600)
wire.send(Allocated())
while True:
    step = wire.receive(dict)
    if behaviour == "fails-computing":
        wire.send(Failed.of(ModelError("the weights are gone")))
        sys.exit(1)
    wire.send(Computed(step["step_id"], 0.25))
    if stage["index"] == stage["num_stages"] - 1:
        wire.send(Sampled(step["step_id"], 0.5, np.zeros(1, np.int32), {}))
"""


def specs(folder: Path, behaviour: str, num_stages: int = 2) -> list[StageSpec]:
    folder = folder / behaviour
    folder.mkdir(exist_ok=True)
    with (folder / "weights").open("wb") as weights:
        weights.truncate(4 << 30)  # sparse: it makes the limit of loading long
    one = StageSpec(
        index=0, num_stages=num_stages, first_layer=0, end_layer=1, model_folder=str(folder), trust_remote_code=False,
        dtype="float32", device="cpu", attention="reference", num_threads=1, cpus=(), kv=KvLayout(1, 16, 4, 16),
        hidden_size=16, vocabulary_size=8, eos_token_ids=(), max_step_tokens=8, max_batch_sequences=1,
    )  # fmt: skip
    return [replace(one, index=index) for index in range(num_stages)]


def offered(stages: Sequence[StageMemory]) -> Capacity:
    return Capacity(
        num_blocks=4, block_tokens=16, num_stages=len(stages), max_batches=1, max_step_tokens=8, max_batch_sequences=1
    )


def a_step(released: tuple[int, ...] = ()) -> Step:
    return Step(
        step_id=5,
        sequence_ids=(1,),
        query_lengths=np.ones(1, np.int32),
        context_lengths=np.zeros(1, np.int32),
        token_ids=np.ones(1, np.int32),
        block_tables=np.zeros((1, 1), np.int32),
        samples=np.ones(1, np.bool_),
        copied_blocks=np.zeros((0, 2), np.int32),
        released=released,
    )


@pytest.fixture
def fake_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "WORKER_COMMAND", (sys.executable, "-c", PROGRAM))


@pytest.fixture
def no_descriptor_leaks() -> Iterator[None]:
    before = os.listdir("/proc/self/fd")
    yield
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.usefixtures("fake_workers", "no_descriptor_leaks")
@pytest.mark.parametrize(
    ("behaviour", "error", "words"),
    [
        ("hangs-allocating", WorkerError, "stage 0 of 2 said nothing for 1 s while allocating its KV"),
        ("cannot-load", ModelError, "^there are no weights$"),
    ],
)
def test_a_start_that_fails_says_why_and_leaves_nothing(
    tmp_path: Path, behaviour: str, error: type[BatchpipeError], words: str
) -> None:
    with pytest.raises(error, match=words):
        MultiprocessPipeline.open([specs(tmp_path, behaviour)], offered, limits=Limits(start_seconds=1.0))


@pytest.mark.usefixtures("fake_workers", "no_descriptor_leaks")
def test_a_worker_that_hangs_while_loading_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SLOWEST_BYTES_PER_SECOND", 1e12)
    with pytest.raises(WorkerError, match="stage 0 of 2 said nothing for 1 s while loading its layers"):
        MultiprocessPipeline.open([specs(tmp_path, "hangs-loading")], offered, limits=Limits(start_seconds=1.0))


@pytest.mark.usefixtures("no_descriptor_leaks")
def test_a_worker_that_ends_before_it_reads_its_spec_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "WORKER_COMMAND", (sys.executable, "-c", "raise SystemExit(7)"))
    with pytest.raises(WorkerError, match="stage [01] of 2 ended with exit code 7"):
        MultiprocessPipeline.open([specs(tmp_path, "works")], offered)


@pytest.mark.usefixtures("fake_workers", "no_descriptor_leaks")
def test_a_worker_that_cannot_be_started_ends_those_that_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spawn, pids = workers.WorkerGroup._spawn, []

    def first_only(self: workers.WorkerGroup, control_fd: int, links: Sequence[LinkSpec]) -> None:
        if self.pids:
            raise OSError("no more processes")
        spawn(self, control_fd, links)
        pids.extend(self.pids)

    monkeypatch.setattr(workers.WorkerGroup, "_spawn", first_only)
    with pytest.raises(OSError, match="no more processes"):
        MultiprocessPipeline.open([specs(tmp_path, "works", num_stages=3)], offered)
    assert len(pids) == 1 and not Path(f"/proc/{pids[0]}").exists()


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """More than the 1,024 that `select` can wait for."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], 2048), limits[1]))
    taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    yield
    for descriptor in taken:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.usefixtures("fake_workers", "many_descriptors")
def test_one_waits_for_several_pipelines_whatever_the_number_of_open_files(tmp_path: Path) -> None:
    first, second = MultiprocessPipeline.open([specs(tmp_path, "works"), specs(tmp_path, "works")], offered)
    with first, second:
        assert min(end.fileno() for end in first._workers.sockets) > 1024
        assert not first.wait(0.0, [second])
        second.submit(a_step())
        while not second.ready():
            assert first.wait(60.0, [second])
        assert not first.ready()
        result = second.collect()
        assert (result.step_id, result.compute_seconds, result.stage_seconds) == (5, (0.25, 0.25), (0.25, 0.75))
        assert not second.wait(0.0, [first])


@pytest.mark.usefixtures("fake_workers", "no_descriptor_leaks")
def test_a_step_for_a_worker_that_has_ended_is_an_error(tmp_path: Path) -> None:
    (pipeline,) = MultiprocessPipeline.open([specs(tmp_path, "works", num_stages=1)], offered)
    with pipeline:
        os.kill(pipeline.worker_pids[0], signal.SIGKILL)
        os.waitid(os.P_PID, pipeline.worker_pids[0], os.WEXITED | os.WNOWAIT)
        with pytest.raises(
            WorkerError, match="stage 0 of 1 was ended by SIGKILL; the system may have run out of memory"
        ):
            pipeline.submit(a_step())


@pytest.mark.usefixtures("fake_workers", "no_descriptor_leaks")
def test_an_error_that_a_worker_sent_before_it_ended_is_raised(tmp_path: Path) -> None:
    """Also where the controller sends the next step before it has read that error."""
    (pipeline,) = MultiprocessPipeline.open(
        [specs(tmp_path, "fails-computing", num_stages=1)], lambda stages: replace(offered(stages), max_batches=2)
    )
    with pipeline:
        pipeline.submit(a_step())
        os.waitid(os.P_PID, pipeline.worker_pids[0], os.WEXITED | os.WNOWAIT)
        with pytest.raises(ModelError, match="^the weights are gone$"):
            pipeline.submit(a_step())


def test_the_cause_of_a_failed_step_reaches_the_controller() -> None:
    with open_tiny("llama", 2, 16, 60, transport="shared_memory") as pipeline:
        pipeline.submit(a_step(released=(77,)))  # the sampler knows of no such sequence
        with pytest.raises(WorkerError, match=r"(?s)stage 1 of 2 failed; .*KeyError: 77"):
            pipeline.collect()
