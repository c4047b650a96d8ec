"""Steps that do not fit a GPU's memory as a whole, with a model runner that says so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from batchpipe.attention.base import AttentionBackend, AttentionInputs
from batchpipe.attention.reference import ReferenceAttention
from batchpipe.errors import MemoryLimitError
from batchpipe.pipeline.model_runner.base import StagePart
from batchpipe.pipeline.model_runner.fitting import FittingRunner, StepRoom, parts_of, room_beside_steps
from batchpipe.types import Int32Array, Step, Transfers

BACKEND = ReferenceAttention()
steps = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 50), st.booleans()), min_size=1, max_size=8)


def step_of(sequences: list[tuple[int, int, bool]], transfers: Transfers | None = None) -> Step:
    new, context, samples = (np.array(column) for column in zip(*sequences, strict=True))
    return Step(
        step_id=3,
        sequence_ids=tuple(range(len(new))),
        query_lengths=new.astype(np.int32),
        context_lengths=context.astype(np.int32),
        token_ids=np.arange(new.sum(), dtype=np.int32),
        block_tables=np.arange(len(new), dtype=np.int32)[:, None],
        samples=samples.astype(np.bool_),
        copied_blocks=np.zeros((0, 2), np.int32),
        transfers=transfers,
    )


class SmallRunner:
    """Gives one number for each sequence that samples: its last token's id plus its position. Notes what it ran."""

    def __init__(self, most_tokens: int) -> None:
        self.most_tokens = most_tokens
        self.sizes: list[int] = []
        self._output = torch.zeros(100, 1)  # the same memory for every step, as a recorded step has it

    def run(
        self, step: Step, hidden: Tensor | None, backend: AttentionBackend, staging_slots: Int32Array | None,
        sampled_before: Tensor | None,
    ) -> Tensor:  # fmt: skip
        if len(step.token_ids) > self.most_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        assert hidden is None or len(hidden) == len(step.token_ids)
        self.sizes.append(len(step.token_ids))
        last = np.cumsum(step.query_lengths) - 1
        numbers = (step.token_ids[last] + step.context_lengths + step.query_lengths)[step.samples]
        self._output[: len(numbers), 0] = torch.from_numpy(numbers.astype(np.float32))
        return self._output[: len(numbers)]


@given(steps, st.integers(1, 70))
def test_parts_make_up_the_step(sequences: list[tuple[int, int, bool]], max_tokens: int) -> None:
    step = step_of(sequences)
    parts = list(parts_of(step, max_tokens))
    assert [token for part, _ in parts for token in part.token_ids.tolist()] == step.token_ids.tolist()
    assert all(0 < len(part.token_ids) <= max_tokens for part, _ in parts)
    seen = dict.fromkeys(step.sequence_ids, 0)
    for part, tokens in parts:
        assert part.token_ids.tolist() == step.token_ids[tokens].tolist()
        for i, sequence in enumerate(part.sequence_ids):
            assert part.context_lengths[i] == step.context_lengths[sequence] + seen[sequence]
            assert part.block_tables[i] == step.block_tables[sequence]
            seen[sequence] += int(part.query_lengths[i])
    assert list(seen.values()) == step.query_lengths.tolist()


@given(steps, st.integers(1, 70))
def test_a_step_in_parts_samples_what_the_whole_one_does(
    sequences: list[tuple[int, int, bool]], most_tokens: int
) -> None:
    step = step_of(sequences)
    whole = SmallRunner(1000).run(step, None, BACKEND, None, None).clone()
    small = SmallRunner(most_tokens)
    runner = FittingRunner(small, 1000)
    hidden = torch.zeros(len(step.token_ids), 2)
    assert torch.equal(runner.run(step, hidden, BACKEND, None, None), whole)
    assert sum(small.sizes) == len(step.token_ids)
    num_before = len(small.sizes)
    assert torch.equal(runner.run(step, None, BACKEND, None, None), whole)  # the limit is known by now
    assert sum(small.sizes[num_before:]) == len(step.token_ids)


def test_where_no_token_fits_the_error_names_the_key() -> None:
    with pytest.raises(MemoryLimitError, match=r"engine.kv_device_memory: .* one token .*Tried to allocate 2.00 GiB"):
        FittingRunner(SmallRunner(0), 8).run(step_of([(3, 0, True)]), None, BACKEND, None, None)


def test_with_two_tiers_the_error_names_the_key() -> None:
    nothing = np.zeros((1, 1), np.int32)
    transfers = Transfers(nothing, nothing - 1, nothing[:0], nothing[0, :0], nothing[0, :0], nothing[:0])
    with pytest.raises(MemoryLimitError, match="engine.max_step_tokens: a step of 30 tokens .* set it to 15 or less"):
        FittingRunner(SmallRunner(20), 64).run(step_of([(30, 0, True)], transfers), None, BACKEND, None, None)


class CardWithRoomFor:
    """A GPU's memory, and a model on it whose step takes a mebibyte a token."""

    def __init__(self, num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_tokens, self.peak_bytes, self.asked = num_tokens, 0, list[int]()
        for name, stand_in in {
            "empty_cache": lambda: None,
            "mem_get_info": lambda device: (num_tokens << 20, 64 << 30),
            "reset_peak_memory_stats": lambda device: None,
            "memory_allocated": lambda device: 0,
            "max_memory_allocated": lambda device: self.peak_bytes,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def forward(self, inputs: AttentionInputs, source: Tensor, positions: Tensor, rows: Tensor | None) -> None:
        assert len(source) == len(positions) and (rows is None or len(rows) <= 4)
        self.asked.append(len(positions))
        if len(positions) > self.num_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.peak_bytes = len(positions) << 20
        query = torch.zeros(2, 3)
        options: Any = None
        assert inputs.backend.forward(inputs, 0, query, query, query, options).shape == query.shape


def part_on(card: CardWithRoomFor, *, is_first: bool) -> StagePart:
    model: Any = card
    return StagePart(
        model=model, first_layer=0, is_first=is_first, is_last=is_first, max_step_tokens=8192, max_batch_sequences=4
    )


@pytest.mark.parametrize("is_first", [True, False])
def test_kv_gets_what_the_largest_step_leaves(is_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    card = CardWithRoomFor(20_000, monkeypatch)
    room = room_beside_steps(part_on(card, is_first=is_first), 32, torch.float32, torch.device("cpu"))
    assert room == StepRoom(8192, (20_000 - 8192 - 1024) << 20) and card.asked == [8192]


def test_a_largest_step_that_does_not_fit_is_halved(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    card = CardWithRoomFor(3000, monkeypatch)
    room = room_beside_steps(part_on(card, is_first=True), 32, torch.float32, torch.device("cpu"))
    assert room.max_tokens == 2048 and card.asked == [8192, 4096, 2048]
    assert "larger ones are run in parts of 2048" in caplog.text


def test_no_room_for_one_token_names_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    card = CardWithRoomFor(0, monkeypatch)
    with pytest.raises(MemoryLimitError, match=r"engine\.num_stages: .* below 4"):
        room_beside_steps(part_on(card, is_first=True), 32, torch.float32, torch.device("cpu"))
