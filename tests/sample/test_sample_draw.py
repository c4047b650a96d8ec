from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from transformers.generation import logits_process

from batchpipe.sample.draw import draw, kth_largest_bound
from batchpipe.sample.rng import uniforms

OFF: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def drawn(logits: NDArray[np.float32], uniform: float, **how: Any) -> int:
    return draw(logits.copy(), best=logits.max(), uniform=uniform, **(OFF | how))


def frequencies(logits: NDArray[np.float32], num_draws: int, **how: Any) -> NDArray[np.float64]:
    """Draws with evenly spaced uniforms: each token's count is right to within one or so, by its one interval."""
    tokens = [drawn(logits, (i + 0.5) / num_draws, **how) for i in range(num_draws)]
    return np.bincount(tokens, minlength=len(logits)) / num_draws


def transformers_probabilities(
    logits: NDArray[np.float32], *, temperature: float, top_k: int, top_p: float, min_p: float
) -> NDArray[np.float64]:
    no_ids = torch.LongTensor(1, 0)  # what the text holds changes none of these
    scores = logits_process.TemperatureLogitsWarper(temperature)(no_ids, torch.from_numpy(logits)[None])
    if top_k:
        scores = logits_process.TopKLogitsWarper(top_k)(no_ids, scores)
    if top_p < 1:
        scores = logits_process.TopPLogitsWarper(top_p)(no_ids, scores)
    if min_p:
        scores = logits_process.MinPLogitsWarper(min_p)(no_ids, scores)
    probabilities: NDArray[np.float64] = scores[0].double().softmax(0).numpy()
    return probabilities


@pytest.mark.parametrize("seed", range(60))
def test_every_token_comes_as_often_as_transformers_gives_it(seed: int) -> None:
    random = np.random.default_rng(seed)
    num_tokens = int(random.choice([3, 63, 64, 65, 200, 700]))
    logits = (random.normal(size=num_tokens) * random.uniform(0.1, 4)).astype(np.float32)
    how: dict[str, Any] = {
        "temperature": float(random.uniform(0.3, 2.0)),
        "top_k": int(random.choice([0, 0, 1, 2, 5, num_tokens // 2, num_tokens - 1, num_tokens + 5])),
        "top_p": float(random.choice([1.0, random.uniform(0.01, 0.999), random.uniform(0.01, 0.999)])),
        "min_p": float(random.choice([0.0, 0.0, random.uniform(0.001, 0.5)])),
    }
    expected = transformers_probabilities(logits, **how)
    found = frequencies(logits, 1000, **how)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1.01 / 1000)
    assert not found[expected == 0].any()


@pytest.mark.parametrize(
    "how",
    [{}, {"top_p": 0.9}, {"top_k": 40}, {"top_k": 1000, "top_p": 0.97}, {"min_p": 0.02}, {"top_p": 0.999999}],
)
def test_a_large_vocabulary_against_a_full_sort(how: dict[str, Any]) -> None:
    random = np.random.default_rng(5)
    logits = (10 - 1.5 * np.log(random.permutation(30_000) + 1) + random.normal(size=30_000)).astype(np.float32)
    settings = OFF | how
    order = np.argsort(-logits, kind="stable")
    weights = np.exp((logits[order] - logits.max()).astype(np.float64))
    if settings["top_k"]:
        weights[settings["top_k"] :] = 0
    if settings["top_p"] < 1:
        weights[np.cumsum(weights) - weights >= settings["top_p"] * weights.sum()] = 0
    weights[weights < settings["min_p"]] = 0
    expected = np.zeros(len(logits))
    expected[order] = weights / weights.sum()
    np.testing.assert_allclose(frequencies(logits, 2000, **how), expected, rtol=0, atol=1.01 / 2000)


def test_draws_with_the_random_streams_pass_a_chi_square_test() -> None:
    logits = np.array([2.0, 1.0, 0.0, -1.0, 1.5, 0.5, -9.0, 0.2], np.float32)
    expected = transformers_probabilities(logits, temperature=0.8, top_k=0, top_p=0.95, min_p=0.0) * 20_000
    numbers = uniforms(np.arange(20_000), np.array([0]))
    counts = np.bincount([drawn(logits, u, temperature=0.8, top_p=0.95) for u in numbers], minlength=8)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 20.5  # 5 degrees of freedom: one in a thousand


@pytest.mark.parametrize("how", [{"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.9}])
def test_equal_tokens_are_kept_or_dropped_together(how: dict[str, Any]) -> None:
    logits = np.array([0.0, 3.0, 2.9, 0.0, 2.9, 0.0], np.float32)
    assert set(np.flatnonzero(frequencies(logits, 300, **how))) == {1, 2, 4}


@given(
    arrays(np.float32, st.integers(1, 300), elements=st.floats(-200, 200, width=32) | st.just(-np.inf)),
    st.integers(0, 2**52 - 1),
    st.sampled_from([1e-5, 0.7, 1.0, 100.0]),
    st.integers(0, 301),
    st.sampled_from([1e-9, 0.5, 0.999999, 1.0]),
    st.sampled_from([0.0, 1e-6, 1.0]),
)
def test_a_token_without_weight_is_never_drawn(
    logits: NDArray[np.float32], step: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits[len(logits) // 2] = 7.0
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    token = drawn(logits, (step + 0.5) * 2.0**-52, **how)
    weight = np.exp((float(logits[token]) - float(logits.max())) / temperature)
    assert weight >= max(min_p * 0.999, 1e-46)
    if top_k > 0:
        assert (logits > logits[token]).sum() < top_k


@pytest.mark.parametrize("uniform", [2.0**-53, 1 - 2.0**-53])
def test_the_ends_of_the_uniforms_give_the_ends_of_what_has_weight(uniform: float) -> None:
    logits = np.full(1000, -np.inf, np.float32)
    logits[[300, 700]] = 1.0
    assert drawn(logits, uniform) in (300, 700)
    assert drawn(logits, uniform, top_p=0.9999) == (300 if uniform < 0.5 else 700)


@given(arrays(np.float32, st.integers(1, 400), elements=st.floats(-9, 9, width=32)), st.data())
def test_at_least_k_values_reach_the_bound(values: NDArray[np.float32], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    bound = kth_largest_bound(values, k)
    assert (values >= bound).sum() >= k
    assert bound <= np.sort(values)[-k]


def test_a_uniform_on_a_border_gives_the_token_behind_it() -> None:
    assert drawn(np.zeros(2, np.float32), 0.5) == 1
    logits = np.full(128, -np.inf, np.float32)
    logits[[0, 3]] = 0.0
    assert drawn(logits, 0.5) == 3
