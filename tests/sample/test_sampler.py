from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process

from batchpipe.sample.rng import stream_of
from batchpipe.sample.sampler import Sampler
from tests.sample.sampling_cases import sequence_start, settings

V = 211
EOS = 7


def sampler_of(*samplings: Any, prompt: tuple[int, ...] = (1, 2, 3)) -> Sampler:
    sampler = Sampler(V, [EOS])
    for i, sampling in enumerate(samplings):
        sampler.start(sequence_start(i, sampling, stream=stream_of(0, "row", i), prompt=prompt))
    return sampler


def random_logits(seed: int, num_rows: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(num_rows, V, generator=generator) * spread).to(dtype)


MIX = [
    settings(),
    settings(temperature=0.8, top_p=0.9),
    settings(temperature=1.3, top_k=20, repetition_penalty=1.2),
    settings(temperature=1.0),
    settings(repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.3),
    settings(temperature=0.7, min_p=0.05, logprobs=3),
    settings(logit_bias={5: 3.0, 9: -100.0}, min_tokens=4),
    settings(temperature=2.0, top_k=50, top_p=0.8, min_p=0.01, frequency_penalty=1.0),
]


def run_together(num_steps: int, dtype: torch.dtype) -> list[list[int]]:
    sampler = sampler_of(*MIX)
    steps = [sampler.sample(random_logits(step, len(MIX), dtype), range(len(MIX))) for step in range(num_steps)]
    return [[int(step.token_ids[i]) for step in steps] for i in range(len(MIX))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(order=st.permutations(range(len(MIX))), cut=st.integers(0, len(MIX)))
@hypothesis_settings(max_examples=15)
def test_tokens_do_not_depend_on_order_or_company(dtype: torch.dtype, order: list[int], cut: int) -> None:
    sampler = sampler_of(*MIX)
    tokens: list[list[int]] = [[] for _ in MIX]
    for step in range(6):
        logits = random_logits(step, len(MIX), dtype)
        for part in (order[:cut], order[cut:]):
            if part:
                for i, token in zip(part, sampler.sample(logits[part], part).token_ids, strict=True):
                    tokens[i].append(int(token))
    assert tokens == run_together(6, dtype)


def test_a_preempted_sequence_goes_on_as_if_nothing_had_been() -> None:
    expected = run_together(9, torch.float32)
    sampler = Sampler(V, [EOS])
    for i, sampling in enumerate(MIX):
        start = sequence_start(i, sampling, stream=stream_of(0, "row", i), generated=expected[i][:5])
        sampler.start(start)
    for step in range(5, 9):
        tokens = sampler.sample(random_logits(step, len(MIX)), range(len(MIX))).token_ids
        assert tokens.tolist() == [expected[i][step] for i in range(len(MIX))]


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_greedy_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    processor = logits_process.RepetitionPenaltyLogitsProcessor(penalty)
    sampler = sampler_of(settings(repetition_penalty=penalty), prompt=(4, 4, 8, 150))
    tokens = [4, 4, 8, 150]
    for step in range(120):  # more distinct tokens than the table starts with
        logits = random_logits(step, 1, spread=0.7)
        expected = int(processor(torch.tensor([tokens]), logits).argmax())
        assert sampler.sample(logits, [0]).token_ids.tolist() == [expected]
        tokens.append(expected)
    assert len(set(tokens)) > 64


def test_presence_and_frequency_count_generated_tokens_alone() -> None:
    sampler = sampler_of(settings(presence_penalty=0.4, frequency_penalty=0.25), prompt=(1, 2, 3))
    counts = torch.zeros(V)
    for step in range(60):
        logits = random_logits(step % 5, 1, spread=0.8)
        expected = int((logits - 0.25 * counts - 0.4 * (counts > 0)).argmax())
        assert sampler.sample(logits, [0]).token_ids.tolist() == [expected]
        counts[expected] += 1
    assert counts.max() > 1


def test_a_presence_penalty_leaves_the_prompt_alone_beside_a_repetition_penalty() -> None:
    logits = torch.zeros(1, V)
    logits[0, 2], logits[0, 60] = 4.0, 2.5  # token 2 is in the prompt: 4 / 1.5 > 2.5
    sampler = sampler_of(settings(repetition_penalty=1.5, presence_penalty=1.0))
    assert [sampler.sample(logits, [0]).token_ids.item() for _ in range(2)] == [2, 60]


def test_penalties_come_before_temperature_and_truncation() -> None:
    sampling = settings(temperature=0.5, top_k=1, repetition_penalty=2.0)
    logits = torch.full((1, V), -50.0)
    logits[0, 1], logits[0, 60] = 4.0, 3.0  # token 1 is in the prompt
    assert sampler_of(sampling).sample(logits, [0]).token_ids.tolist() == [60]


@pytest.mark.parametrize("logprobs", [0, 1])
@pytest.mark.parametrize("min_tokens", [0, 1, 3])
def test_minimum_length_holds_back_the_end_as_in_transformers(min_tokens: int, logprobs: int) -> None:
    processor = logits_process.MinNewTokensLengthLogitsProcessor(3, min_tokens, [EOS, 90])
    logits = torch.zeros(1, V)
    logits[0, EOS], logits[0, 90], logits[0, 33] = 9.0, 8.0, 7.0
    sampler = sampler_of(settings(min_tokens=min_tokens, stop_token_ids=(90,), logprobs=logprobs))
    tokens = [1, 2, 3]
    for _ in range(5):
        tokens.append(int(processor(torch.tensor([tokens]), logits).argmax()))
        assert sampler.sample(logits, [0]).token_ids.tolist() == tokens[-1:]
    assert tokens[3:] == [33] * min_tokens + [EOS] * (5 - min_tokens)


def test_an_ignored_end_token_is_a_token_like_any_other() -> None:
    logits = torch.zeros(1, V)
    logits[0, EOS] = 9.0
    sampler = sampler_of(settings(min_tokens=5, ignore_eos=True))
    assert sampler.sample(logits, [0]).token_ids.tolist() == [EOS]


def test_bias_adds_to_logits() -> None:
    logits = torch.zeros(1, V)
    logits[0, 20] = 5.0
    assert sampler_of(settings(logit_bias={30: 5.5})).sample(logits, [0]).token_ids.tolist() == [30]
    assert sampler_of(settings(logit_bias={20: -5.5})).sample(logits, [0]).token_ids.tolist() == [0]


def test_temperature_zero_and_nearly_zero_are_greedy() -> None:
    logits = random_logits(3, 3)
    sampler = sampler_of(settings(top_p=0.5), settings(temperature=1e-9), settings(temperature=1e-4))
    assert sampler.sample(logits, [0, 1, 2]).token_ids.tolist() == logits.argmax(1).tolist()


def test_the_stream_decides_and_each_place_draws_anew() -> None:
    sampler = Sampler(V, [EOS])
    for i, stream in enumerate([5, 5, 6]):
        sampler.start(sequence_start(i, settings(temperature=1.0), stream=stream))
    steps = [sampler.sample(torch.zeros(3, V), range(3)).token_ids.tolist() for _ in range(10)]
    first, twin, other = zip(*steps, strict=True)
    assert first == twin != other
    assert len(set(first)) > 5


def test_rows_without_finite_logits_are_minus_one_and_count_for_nothing() -> None:
    broken = random_logits(0, len(MIX))
    broken[:, 100] = float("nan")
    sampler = sampler_of(*MIX)
    result = sampler.sample(broken, range(len(MIX)))
    assert result.token_ids.tolist() == [-1] * len(MIX)
    assert result.logprobs == {}
    after = sampler.sample(random_logits(0, len(MIX)), range(len(MIX))).token_ids.tolist()
    assert after == [tokens[0] for tokens in run_together(1, torch.float32)]


def test_one_broken_row_leaves_the_others_alone() -> None:
    logits = random_logits(0, len(MIX))
    logits[1] = float("-inf")
    tokens = sampler_of(*MIX).sample(logits, range(len(MIX))).token_ids.tolist()
    expected = [row[0] for row in run_together(1, torch.float32)]
    assert tokens == [expected[0], -1, *expected[2:]]


def test_settings_that_forbid_every_token_give_minus_one() -> None:
    sampling = settings(temperature=1.0, logprobs=1, logit_bias=dict.fromkeys(range(V), float("-inf")))
    result = sampler_of(sampling).sample(random_logits(0, 1), [0])
    assert result.token_ids.tolist() == [-1]
    assert result.logprobs == {}


@pytest.mark.parametrize("num_top", [1, 5, V + 10])
def test_logprobs_are_of_the_logits_as_they_came(num_top: int) -> None:
    logits = random_logits(4, 2, torch.bfloat16, spread=3.0)
    plain, changed = settings(logprobs=num_top), settings(logprobs=num_top, temperature=1.7, logit_bias={50: 40.0})
    result = sampler_of(plain, changed).sample(logits, [0, 1])
    assert sorted(result.logprobs) == [0, 1]
    for i, found in result.logprobs.items():
        expected = logits[i].double().log_softmax(0)
        top = expected.sort(descending=True, stable=True)
        assert found.token_id == result.token_ids[i]
        assert found.logprob == pytest.approx(expected[found.token_id].item(), abs=1e-5)
        assert found.top_ids == tuple(top.indices[:num_top].tolist())
        assert found.top_logprobs == pytest.approx(top.values[:num_top].tolist(), abs=1e-5)
    assert result.logprobs[1].token_id == 50


def test_logprobs_come_only_where_asked_for() -> None:
    result = sampler_of(settings(), settings(logprobs=1)).sample(random_logits(0, 2), [0, 1])
    assert list(result.logprobs) == [1]


def test_a_released_sequence_is_unknown() -> None:
    sampler = sampler_of(settings(), settings())
    sampler.release(0)
    with pytest.raises(KeyError):
        sampler.sample(random_logits(0, 1), [0])
    assert len(sampler.sample(random_logits(0, 1), [1]).token_ids) == 1


def test_logits_of_another_vocabulary_are_our_mistake() -> None:
    with pytest.raises(AssertionError):
        sampler_of(settings()).sample(torch.zeros(1, V + 1), [0])


def test_the_given_logits_stay_as_they_are() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = random_logits(1, len(MIX), dtype)
        before = logits.clone()
        sampler_of(*MIX).sample(logits, range(len(MIX)))
        assert torch.equal(logits, before)


def test_token_ids_are_int32() -> None:
    assert sampler_of(*MIX).sample(random_logits(0, len(MIX)), range(len(MIX))).token_ids.dtype == np.int32
