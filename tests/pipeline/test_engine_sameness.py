"""The engine against transformers: whatever the stages, blocks, batch mix or preemptions, the tokens are the same."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from batchpipe.errors import WorkerError
from batchpipe.job.spec import EngineSpec
from batchpipe.model.describe import describe_model
from batchpipe.pipeline.base import Pipeline
from batchpipe.pipeline.local import LocalPipeline
from batchpipe.pipeline.memory import StageMemory
from batchpipe.pipeline.multiprocess import MultiprocessPipeline
from batchpipe.pipeline.worker import Transport
from batchpipe.pipeline.workers import DEFAULT_LIMITS, Limits
from batchpipe.placement.open import stage_specs
from batchpipe.placement.stage_split import StageSplit, stage_layers
from batchpipe.runner.engine import Engine
from batchpipe.types import Capacity, Request
from tests.scheduler.drive import run_engine
from tests.scheduler.scheduler_cases import request, sampling
from tests.tiny_models import ARCHITECTURES, MORE_ARCHITECTURES, tiny_model
from tests.transformers_tokens import greedy_tokens

NEW_TOKENS = 24
PROMPT_LENGTHS = (3, 21, 1, 14, 6, 40, 9, 2, 17, 11)
NAMED = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "gpt_oss", "mixtral", "qwen3_moe",
    "phimoe", "granitemoehybrid",
)  # fmt: skip


def prompts() -> list[Request]:
    random = np.random.default_rng(3)
    shared = random.integers(0, 256, 12).astype(np.int32)  # with what some of the prompts begin
    texts = [random.integers(0, 256, length).astype(np.int32) for length in PROMPT_LENGTHS]
    return [
        Request(
            request(i, 1).key,
            np.concatenate([shared, text]) if i % 3 else text,
            sampling(max_tokens=NEW_TOKENS, ignore_eos=True),
        )
        for i, text in enumerate(texts)
    ]


@functools.cache
def expected(architecture: str) -> list[tuple[int, ...]]:
    return greedy_tokens(tiny_model(architecture), [one.prompt_token_ids.tolist() for one in prompts()], NEW_TOKENS)


def open_tiny(
    architecture: str,
    num_stages: int,
    block_tokens: int,
    num_blocks: int,
    *,
    max_step_tokens: int = 16,
    attention: str = "reference",
    transport: Transport | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Pipeline:
    engine = EngineSpec.model_validate(
        {
            "device": "cpu",
            "block_tokens": block_tokens,
            "max_step_tokens": max_step_tokens,
            "max_batch_sequences": 8,
            "attention": attention,
        }
    )
    info = describe_model(tiny_model(architecture), "float32")
    specs = stage_specs(engine, info, StageSplit("cpu", stage_layers(info, num_stages)), block_tokens)

    def offered(stages: Sequence[StageMemory]) -> Capacity:
        return Capacity(
            num_blocks=num_blocks,
            block_tokens=stages[0].block_tokens,
            num_stages=num_stages,
            max_batches=num_stages,
            max_step_tokens=max_step_tokens,
            max_batch_sequences=8,
        )

    if transport is None:
        return LocalPipeline(specs, offered)
    return MultiprocessPipeline.open([specs], offered, transport, limits)[0]


def generate(*pipelines: Pipeline, schedule: str = "hybrid") -> tuple[list[tuple[int, ...]], Engine]:
    with ExitStack() as stack:
        for pipeline in pipelines:
            stack.enter_context(pipeline)
        engine = Engine(pipelines, schedule, frozenset(), lambda params: None)
        finished = run_engine(engine, prompts())
    finished.sort(key=lambda end: end.request.key.index)
    return [end.completions[0].token_ids for end in finished], engine


@pytest.mark.parametrize("architecture", NAMED)
def test_every_architecture_in_stages_and_blocks_of_any_size(architecture: str) -> None:
    assert architecture in ARCHITECTURES
    for num_stages, block_tokens, num_blocks, schedule in [
        (1, 16, 60, "hybrid"),
        (2, 1, 600, "separate"),
        (3, 64, 30, "hybrid"),
    ]:
        texts, _ = generate(open_tiny(architecture, num_stages, block_tokens, num_blocks), schedule=schedule)
        assert texts == expected(architecture), (num_stages, block_tokens)


@pytest.mark.parametrize("architecture", MORE_ARCHITECTURES)
def test_the_others_in_one_stage_and_in_two(architecture: str) -> None:
    for num_stages in (1, 2):
        texts, _ = generate(open_tiny(architecture, num_stages, 16, 60))
        assert texts == expected(architecture), num_stages


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("attention", ["reference", "cpu"])
def test_preemptions_change_nothing(architecture: str, attention: str) -> None:
    texts, engine = generate(open_tiny(architecture, 2, 4, 24, attention=attention))
    assert engine.replicas[0].scheduler.num_preemptions > 0
    assert texts == expected(architecture)


@pytest.mark.parametrize("max_step_tokens", [8, 13, 200])
def test_any_mix_of_prefills_and_decodes(max_step_tokens: int) -> None:
    for schedule in ("hybrid", "separate"):
        pipeline = open_tiny("qwen3", 1, 16, 60, max_step_tokens=max_step_tokens, attention="cpu")
        assert generate(pipeline, schedule=schedule)[0] == expected("qwen3")


@pytest.mark.parametrize(("num_stages", "transport"), [(1, "shared_memory"), (3, "shared_memory"), (2, "gloo")])
def test_processes_say_the_same_as_one(num_stages: int, transport: Transport) -> None:
    texts, _ = generate(open_tiny("llama", num_stages, 16, 60, transport=transport))
    assert texts == expected("llama")


def test_replicas_share_the_rows_and_say_the_same() -> None:
    pipelines = [open_tiny("llama", 2, 16, 60, transport="shared_memory") for _ in range(2)]
    texts, engine = generate(*pipelines)
    assert texts == expected("llama")
    assert all(replica.scheduler.num_steps > 0 for replica in engine.replicas)


def test_a_replica_that_loses_a_worker_goes_on_beside_the_other(caplog: pytest.LogCaptureFixture) -> None:
    pipelines = [open_tiny("llama", 1, 16, 60, transport="shared_memory") for _ in range(2)]
    with pipelines[0], pipelines[1]:
        engine = Engine(pipelines, "hybrid", frozenset(), lambda params: None)
        engine.add(prompts())
        finished = engine.advance()
        assert isinstance(pipelines[1], MultiprocessPipeline)
        os.kill(pipelines[1].worker_pids[0], signal.SIGKILL)
        while not engine.idle:
            finished += engine.advance()
    assert "stage 0 of 1 was ended by SIGKILL" in caplog.text
    finished.sort(key=lambda end: end.request.key.index)
    assert [end.completions[0].token_ids for end in finished] == expected("llama")


def test_a_killed_worker_is_named_and_survived_once(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = open_tiny("llama", 2, 16, 60, transport="shared_memory")
    assert isinstance(pipeline, MultiprocessPipeline)
    with pipeline:
        engine = Engine([pipeline], "hybrid", frozenset(), lambda params: None)
        engine.add(prompts())
        finished = []
        for _ in range(8):
            finished += engine.advance()
        os.kill(pipeline.worker_pids[1], signal.SIGKILL)
        while not engine.idle:
            finished += engine.advance()
        assert "stage 1 of 2 was ended by SIGKILL" in caplog.text
        finished.sort(key=lambda end: end.request.key.index)
        assert [end.completions[0].token_ids for end in finished] == expected("llama")

        engine.add(prompts())
        engine.advance()
        os.kill(pipeline.worker_pids[0], signal.SIGKILL)
        with pytest.raises(WorkerError, match="stage 0 of 2 was ended by SIGKILL"):
            while not engine.idle:
                engine.advance()


def test_a_worker_that_says_nothing_is_named_and_ended() -> None:
    pipeline = open_tiny("llama", 2, 16, 60, transport="shared_memory", limits=Limits(step_seconds=2.0))
    assert isinstance(pipeline, MultiprocessPipeline)
    with pipeline:
        engine = Engine([pipeline], "hybrid", frozenset(), lambda params: None)
        engine.replicas[0].add(prompts())
        step = engine.replicas[0].scheduler.next_step()
        assert step is not None
        pids = pipeline.worker_pids
        os.kill(pids[0], signal.SIGSTOP)
        pipeline.submit(step)
        with pytest.raises(WorkerError, match="stage 0 of 2 said nothing for 2 s"):
            pipeline.collect()
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
