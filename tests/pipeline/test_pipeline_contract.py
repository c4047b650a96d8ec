"""What `Pipeline` promises, kept by stages in this process, by worker processes, and by the two without a model."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil
import pytest

from batchpipe.cost.model import KvLink
from batchpipe.errors import WorkerError
from batchpipe.pipeline.base import Pipeline
from batchpipe.pipeline.fake import FakePipeline
from batchpipe.pipeline.simulated import SimulatedPipeline
from batchpipe.types import SequenceStart, Step, StepResult
from tests.cost.formula_cost import FormulaCost
from tests.pipeline.swap.swap_pipelines import capacity_of, open_pipeline, program, run
from tests.scheduler.scheduler_cases import sampling

NUM_STAGES, MAX_BATCHES = 2, 3
NUM_TOKENS = 5  # of each sequence on the simulated pipeline, the end token included
KINDS = ("local", "workers", "fake", "simulated")
every_kind = pytest.mark.parametrize("kind", KINDS)
numbers = itertools.count()  # of steps and of sequences: each is new to a pipeline that several tests share


def opened(kind: str, *, two_tiers: bool = False) -> Pipeline:
    if kind in ("local", "workers"):
        return open_pipeline(NUM_STAGES, MAX_BATCHES, two_tiers=two_tiers, workers=kind == "workers")
    capacity = capacity_of(NUM_STAGES, MAX_BATCHES, two_tiers=two_tiers)
    if kind == "fake":
        return FakePipeline(capacity, 336, eos_token_id=2)
    cost = FormulaCost(
        lambda stage, work: work.num_tokens * 1e-3, NUM_STAGES, kv_links=(KvLink(1e6, 1e6, 256, 2),) * NUM_STAGES
    )
    return SimulatedPipeline(capacity, cost, dict.fromkeys(range(1000), NUM_TOKENS), 2)


@pytest.fixture(scope="module", params=KINDS)
def pipeline(request: pytest.FixtureRequest) -> Iterator[Pipeline]:
    """One tier of KV. Every test collects what it submits."""
    with opened(request.param) as pipeline:
        yield pipeline


@dataclass
class Text:
    """A sequence and the blocks it writes to. num_done: tokens that have KV once all steps made so far have run."""

    num_prompt: int
    blocks: Sequence[int] = range(8)
    tokens: list[int] = field(default_factory=list)
    sequence_id: int = field(default_factory=lambda: next(numbers))
    num_done: int = 0
    is_started: bool = False

    def __post_init__(self) -> None:
        self.tokens = self.tokens or [10 + i for i in range(self.num_prompt)]

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    def start(self) -> SequenceStart:
        prompt = np.array(self.tokens[: self.num_prompt], np.int32)
        return SequenceStart(self.sequence_id, self.sequence_id, sampling(), prompt, tuple(self.generated))


def step_of(*chunks: tuple[Text, int], released: Sequence[Text] = ()) -> Step:
    """A step with the next `num_tokens` tokens of each text. With the last of them it draws a new token."""
    texts = [text for text, _ in chunks]
    step = Step(
        step_id=next(numbers),
        sequence_ids=tuple(text.sequence_id for text in texts),
        query_lengths=np.array([num_tokens for _, num_tokens in chunks], np.int32),
        context_lengths=np.array([text.num_done for text in texts], np.int32),
        token_ids=np.concatenate([np.array(t.tokens[t.num_done : t.num_done + n], np.int32) for t, n in chunks]),
        block_tables=np.array([list(text.blocks) for text in texts], np.int32),
        samples=np.array([text.num_done + num_tokens == len(text.tokens) for text, num_tokens in chunks]),
        copied_blocks=np.zeros((0, 2), np.int32),
        started=tuple(text.start() for text in texts if not text.is_started),
        released=tuple(text.sequence_id for text in released),
    )
    for text, num_tokens in chunks:
        text.num_done, text.is_started = text.num_done + num_tokens, True
    return step


def generate(pipeline: Pipeline, text: Text, num_tokens: int, released: Sequence[Text] = ()) -> list[int]:
    """The text alone, one token a step after its first step."""
    for _ in range(num_tokens):
        pipeline.submit(step_of((text, len(text.tokens) - text.num_done), released=released))
        text.tokens += pipeline.collect().token_ids.tolist()
        released = ()
    return text.generated


def becomes_ready(pipeline: Pipeline) -> bool:
    """Messages of other steps and of single stages end the waiting as well, a few times."""
    for _ in range(100):
        if pipeline.ready():
            return True
        assert pipeline.wait(60.0)
    return False


def check_shape(result: StepResult, step: Step) -> None:
    assert result.step_id == step.step_id
    assert result.token_ids.dtype == np.int32
    assert result.token_ids.shape == (step.samples.sum(),)
    assert (len(result.compute_seconds), len(result.stage_seconds)) == (NUM_STAGES, NUM_STAGES)
    assert min(*result.compute_seconds, result.sampling_seconds) >= 0
    assert result.stage_seconds[:-1] == result.compute_seconds[:-1]
    assert len(result.link_uses) == (0 if step.transfers is None else NUM_STAGES)
    for use, seconds in zip(result.link_uses, result.compute_seconds, strict=False):
        assert 0 <= use.stall_seconds <= seconds
        assert min(use.loaded_bytes, use.stored_bytes, use.load_seconds, use.store_seconds) >= 0
    assert not result.corrupt


def test_it_offers_what_it_was_opened_for(pipeline: Pipeline) -> None:
    assert pipeline.capacity == capacity_of(NUM_STAGES, MAX_BATCHES, two_tiers=False)
    assert len(pipeline.device_names) == NUM_STAGES
    assert all(pipeline.device_names)


def test_results_come_in_the_order_of_the_steps_and_fit_them(pipeline: Pipeline) -> None:
    """Large steps before small ones; steps that draw for some of their sequences, for one, and for none."""
    whole, part = Text(12, range(8)), Text(12, range(8, 16))
    steps = [
        step_of((whole, 12), (part, 3)),
        step_of((part, 2)),
        step_of((part, 7)),
        step_of((Text(1, range(16, 24)), 1)),
        step_of((Text(20, range(24, 32)), 20), (Text(2, range(32, 40)), 2)),
    ]
    for result, step in zip(run(pipeline, steps), steps, strict=True):
        check_shape(result, step)


def test_it_is_ready_once_the_oldest_result_is_there(pipeline: Pipeline) -> None:
    assert not pipeline.ready()
    for _ in range(2):
        pipeline.submit(step_of((Text(4), 4)))
    for _ in range(2):
        assert becomes_ready(pipeline)
        pipeline.collect()
    assert not pipeline.ready()


def test_more_steps_than_fit_are_refused_and_lose_nothing(pipeline: Pipeline) -> None:
    steps = [step_of((Text(4), 4)) for _ in range(MAX_BATCHES)]
    for step in steps:
        pipeline.submit(step)
    with pytest.raises(AssertionError, match="more steps in flight than the pipeline holds"):
        pipeline.submit(step_of((Text(4), 4)))
    assert [pipeline.collect().step_id for _ in steps] == [step.step_id for step in steps]
    assert not pipeline.ready()


def test_chunks_of_a_prompt_follow_each_other_at_once(pipeline: Pipeline) -> None:
    whole, chunked = Text(12), Text(12)
    expected = generate(pipeline, whole, 3)
    first = run(pipeline, [step_of((chunked, num_tokens)) for num_tokens in (5, 1, 6)])
    assert [len(result.token_ids) for result in first] == [0, 0, 1]
    chunked.tokens += first[-1].token_ids.tolist()
    assert generate(pipeline, chunked, 2) == expected


def test_a_block_may_be_written_by_the_step_behind_the_last_one_that_reads_it(pipeline: Pipeline) -> None:
    texts = [Text(9, tokens=list(range(start, start + 9))) for start in (10, 60, 110)]
    alone = [generate(pipeline, Text(9, tokens=list(text.tokens)), 1) for text in texts]
    together = run(pipeline, [step_of((text, 9)) for text in texts])
    assert [result.token_ids.tolist() for result in together] == alone


def test_a_released_sequence_that_starts_again_goes_on_with_the_same_tokens(pipeline: Pipeline) -> None:
    expected = generate(pipeline, Text(6), NUM_TOKENS)
    text = Text(6)
    generate(pipeline, text, 2)
    text.num_done, text.is_started, text.blocks = 0, False, range(20, 28)
    assert generate(pipeline, text, NUM_TOKENS - 2, released=[text]) == expected


def threads_and_processes() -> tuple[int, set[int]]:
    return threading.active_count(), {process.pid for process in psutil.Process().children(recursive=True)}


@every_kind
def test_two_tiers_are_told_of_by_stage_and_leaving_ends_what_is_in_flight(kind: str) -> None:
    steps, _ = program(2, NUM_STAGES, MAX_BATCHES, "both", "reference")
    before = threads_and_processes()
    with opened(kind, two_tiers=True) as pipeline:
        for result, step in zip(run(pipeline, steps[:-MAX_BATCHES]), steps, strict=False):
            check_shape(result, step)
        for step in steps[-MAX_BATCHES:]:
            pipeline.submit(step)
    assert threads_and_processes() == before


def unknown(text: Text) -> Step:
    """A step of a sequence that the pipeline was not told of, or told to release."""
    text.is_started = True
    return step_of((text, len(text.tokens) - text.num_done))


@pytest.mark.parametrize("kind", ["local", "fake", "simulated"])
def test_a_step_of_an_unknown_sequence_is_an_error(kind: str) -> None:
    """In worker processes too, which the next test starts anew after it."""
    known = Text(4)
    with opened(kind) as pipeline:
        generate(pipeline, known, 2)
        pipeline.submit(unknown(Text(4)))
        with pytest.raises((AssertionError, KeyError)):
            pipeline.collect()
        generate(pipeline, Text(4, range(8, 16)), 1, released=[known])
        pipeline.submit(unknown(known))
        with pytest.raises((AssertionError, KeyError)):
            pipeline.collect()
        pipeline.submit(step_of((Text(4), 4), released=[known]))
        with pytest.raises((AssertionError, KeyError)):
            pipeline.collect()


@pytest.mark.parametrize("kind", ["workers", "fake", "simulated"])
def test_after_an_error_a_restart_forgets_every_step_and_sequence(kind: str) -> None:
    """Stages in this process have nothing that could be lost alone, and are never started anew."""
    with opened(kind) as pipeline:
        expected = generate(pipeline, Text(6), NUM_TOKENS)
        known = Text(6)
        generate(pipeline, known, 2)
        steps = [unknown(Text(4)), *(step_of((Text(4, range(8, 16)), 4)) for _ in range(MAX_BATCHES - 1))]
        for step in steps:
            pipeline.submit(step)
        with pytest.raises((AssertionError, WorkerError)):
            pipeline.collect()
        pipeline.restart()
        assert not pipeline.ready()
        pipeline.submit(step_of((Text(4), 4)))
        assert becomes_ready(pipeline)
        pipeline.collect()
        again = [step_of((Text(4), 4)) for _ in range(MAX_BATCHES)]
        assert [result.step_id for result in run(pipeline, again)] == [step.step_id for step in again]
        assert generate(pipeline, Text(6), NUM_TOKENS) == expected
        pipeline.submit(unknown(known))
        with pytest.raises((AssertionError, WorkerError)):
            pipeline.collect()
