"""Sampling on the GPU against sampling in float64 over the whole row."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.gpu.interpreter import DEVICE  # isort: skip
from batchpipe.sample.greedy import greedy_tokens
from batchpipe.sample.triton_sampling import launch_sampling

# Where the uniform falls this near to the edge between two tokens, float32 may take the other one.
EDGE = 1e-5


def sampled(logits: torch.Tensor, parameters: NDArray[np.float32] | None) -> NDArray[np.int32]:
    tokens = torch.empty(len(logits), dtype=torch.int32, device=DEVICE)
    on_device = None if parameters is None else torch.from_numpy(parameters).to(DEVICE)
    launch_sampling(tokens, logits.to(DEVICE), on_device)
    return tokens.cpu().numpy()


def shares(row: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> NDArray[np.float64]:
    """The cumulative probabilities of what is kept."""
    values = row.double().numpy()
    level = np.sort(values)[-top_k] if 0 < top_k < len(values) else -np.inf
    weights = np.where(values >= level, np.exp((values - values.max()) / np.float32(temperature)), 0)
    if top_p < 1:
        order = np.argsort(-weights, kind="stable")
        reached = np.searchsorted(np.cumsum(weights[order]), np.float32(top_p) * weights.sum() * (1 - 1e-9))
        weights = np.where(weights >= weights[order][min(reached, len(order) - 1)], weights, 0)
    weights = np.where(weights >= np.float32(min_p), weights, 0)
    found: NDArray[np.float64] = np.cumsum(weights) / weights.sum()
    return found


@settings(max_examples=200 if DEVICE.type == "cuda" else 12)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(2, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, 310),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.1]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    has_ties=st.booleans(),
)
def test_tokens_are_those_of_the_whole_row(
    seed: int, width: int, dtype: torch.dtype, temperature: float, top_k: int, top_p: float, min_p: float,
    has_ties: bool,
) -> None:  # fmt: skip
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.normal(size=(3, width)).astype(np.float32) * 3)
    logits = (logits.round() if has_ties else logits).to(dtype)
    uniforms = random.random(3).astype(np.float32)
    parameters = np.repeat(np.array([[temperature], [top_k], [top_p], [min_p], [0]], np.float32), 3, 1)
    parameters[4] = uniforms
    for row, token, uniform in zip(logits, sampled(logits, parameters), uniforms, strict=True):
        cumulative = shares(row, temperature, top_k, top_p, min_p)
        edges = np.abs(cumulative - uniform) < EDGE
        assert edges.any() or token == np.searchsorted(cumulative, uniform, side="right")


def test_greedy_rows_and_rows_that_are_not_finite() -> None:
    random = np.random.default_rng(0)
    logits = torch.from_numpy(random.normal(size=(7, 200)).astype(np.float32))
    logits[1, 5], logits[2, 199], logits[3] = torch.nan, torch.inf, -torch.inf
    logits[4, 100:] = logits[4].max() + 1  # equals: the first one counts
    logits[5, :199] = -torch.inf
    for dtype in (torch.float32, torch.bfloat16):
        expected = greedy_tokens(logits.to(dtype))
        assert expected[[1, 2, 3]].tolist() == [-1, -1, -1]
        assert sampled(logits.to(dtype), None).tolist() == expected.tolist()
        some_greedy = np.array([[0, 1] * 3 + [0], [0] * 7, [1] * 7, [0] * 7, [0.5] * 7], np.float32)
        tokens = sampled(logits.to(dtype), some_greedy)
        assert tokens[[0, 2, 4, 6]].tolist() == expected[[0, 2, 4, 6]].tolist()
        assert tokens[[1, 3]].tolist() == [-1, -1] and tokens[5] == 199


def test_a_row_does_not_depend_on_its_batch() -> None:
    random = np.random.default_rng(1)
    logits = torch.from_numpy(random.normal(size=(4, 150)).astype(np.float32))
    parameters = np.array([[1] * 4, [40] * 4, [0.9] * 4, [0] * 4, random.random(4)], np.float32)
    together = sampled(logits, parameters)
    alone = [sampled(logits[i : i + 1], np.ascontiguousarray(parameters[:, i : i + 1]))[0] for i in range(4)]
    assert together.tolist() == alone
