"""The pipeline of one GPU, on the CPU: kernels in the interpreter, and a runtime whose graphs are replayed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.gpu.fake_cuda import FakeGraph, Recording, fake_cuda  # isort: skip  # noqa: F401
from batchpipe.attention.base import AttentionInputs
from batchpipe.attention.device_inputs import DeviceStepInputs
from batchpipe.job.spec import EngineSpec
from batchpipe.model.describe import describe_model
from batchpipe.model.fused.gpu import fuse_on_gpu
from batchpipe.model.load import StageModel
from batchpipe.pipeline.base import Pipeline
from batchpipe.pipeline.gpu import GpuPipeline
from batchpipe.pipeline.local import LocalPipeline
from batchpipe.pipeline.memory import StageMemory
from batchpipe.pipeline.model_runner.gpu import GpuRunner
from batchpipe.pipeline.model_runner.graphs import StepGraphs
from batchpipe.placement.open import stage_specs
from batchpipe.placement.stage_split import StageSplit, stage_layers
from batchpipe.runner.engine import Engine
from batchpipe.types import Capacity, Completion, Request
from tests.scheduler.drive import run_engine
from tests.scheduler.scheduler_cases import request, sampling
from tests.tiny_models import tiny_model

HOW = (
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.0, "logprobs": 2},  # the host samples these two
    {"temperature": 0.0, "repetition_penalty": 1.3},
)


def prompts() -> list[Request]:
    random = np.random.default_rng(3)
    return [
        Request(
            request(i, 1).key,
            random.integers(0, 256, length).astype(np.int32),
            sampling(max_tokens=4 + i % 2, ignore_eos=True, **HOW[i % len(HOW)]),
        )
        for i, length in enumerate((3, 21, 1, 14, 6))
    ]


def open_tiny(architecture: str, *, on_gpu: bool, dtype: str = "float32") -> GpuPipeline | LocalPipeline:
    attention = "triton" if on_gpu else "reference"
    engine = EngineSpec.model_validate(
        {"device": "cpu", "block_tokens": 16, "max_step_tokens": 16, "max_batch_sequences": 4, "attention": attention}
    )
    info = describe_model(tiny_model(architecture), dtype)
    specs = stage_specs(engine, info, StageSplit("cpu", stage_layers(info, 1)), 16)
    capacity = Capacity(
        num_blocks=40, block_tokens=16, num_stages=1, max_batches=1, max_step_tokens=16, max_batch_sequences=4
    )

    def offer(stages: Sequence[StageMemory]) -> Capacity:
        assert stages[0].block_tokens == 16
        return capacity

    if not on_gpu:
        return LocalPipeline(specs, offer)
    pipeline = GpuPipeline(specs[0], offer)
    runner = pipeline._stage._runner
    assert isinstance(runner, GpuRunner)
    runner._graphs = StepGraphs(torch.device("cpu"))
    return pipeline


def generate(pipeline: Pipeline, num_prompts: int = len(HOW)) -> list[Completion]:
    assert pipeline.capacity.runs_ahead == isinstance(pipeline, GpuPipeline)
    with pipeline:
        finished = run_engine(Engine([pipeline], "hybrid", frozenset(), lambda params: None), prompts()[:num_prompts])
    return [end.completions[0] for end in sorted(finished, key=lambda end: end.request.key.index)]


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_it_says_what_the_cpu_says(architecture: str, fake_cuda: list[FakeGraph]) -> None:  # noqa: F811
    expected = generate(open_tiny(architecture, on_gpu=False))
    found = generate(open_tiny(architecture, on_gpu=True))
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert [row.top_ids for row in one.logprobs] == [row.top_ids for row in other.logprobs]
        numbers = [[number for row in each.logprobs for number in row.top_logprobs] for each in (one, other)]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-4)
    assert any(one.logprobs for one in found)
    assert sum(graph.num_replays for graph in fake_cuda) > len(fake_cuda) > 3


@pytest.mark.filterwarnings("ignore:invalid value")  # numbers of padded rows, which nothing reads
def test_a_decode_launches_few_kernels_and_looks_at_nothing(
    fake_cuda: list[FakeGraph], monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """A recording refuses to look at the device; each operation of it is a kernel that the host would launch."""
    monkeypatch.setattr("batchpipe.pipeline.stage.fuse", lambda model, dtype: fuse_on_gpu(model))
    generate(open_tiny("llama", on_gpu=True, dtype="float16"), 1)
    num_layers = describe_model(tiny_model("llama"), "float16").num_layers
    assert fake_cuda, "no step was recorded"
    for graph in fake_cuda:
        assert len(graph.recording.names) / num_layers < 40, graph.recording.names


def test_a_step_copies_its_indices_at_once() -> None:
    inputs = DeviceStepInputs(torch.device("cpu"), 16, max_tokens=64, max_sequences=8, tile_queries=64)
    lengths = np.array([1, 1, 9], np.int32)
    with Recording() as recording:
        inputs.fill(
            np.arange(11, dtype=np.int32), lengths, 3 * lengths, np.zeros((3, 4), np.int32), lengths > 0
        )  # fmt: skip
    assert recording.names == ["aten::copy_"]


def test_a_model_that_cannot_be_recorded_is_run_step_by_step(
    fake_cuda: list[FakeGraph], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:  # fmt: skip
    expected = [one.token_ids for one in generate(open_tiny("llama", on_gpu=False))]
    forward = StageModel.forward

    def looks(model: StageModel, inputs: AttentionInputs, source: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        assert int(positions.max()) < 1000
        return forward(model, inputs, source, positions, rows)

    monkeypatch.setattr(StageModel, "forward", looks)
    found = generate(open_tiny("llama", on_gpu=True), 2)
    assert [one.token_ids for one in found] == expected[:2]
    assert "cannot be recorded as CUDA graphs" in caplog.text
    assert sum(graph.num_replays for graph in fake_cuda) == 0
