from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchpipe.sample.greedy import INVALID_TOKEN, greedy_tokens

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INFINITY = float("inf")


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([-3.0, -0.5, -0.0, 0.0, 0.5, 2.0, -INFINITY]), min_size=7, max_size=7),
        min_size=1,
        max_size=5,
    )
)
def test_is_the_first_largest_of_float32(dtype: torch.dtype, rows: list[list[float]]) -> None:
    logits = torch.tensor(rows, dtype=dtype)
    best, expected = logits.float().max(dim=1).values, logits.float().argmax(dim=1)
    expected = torch.where(best.isfinite(), expected, INVALID_TOKEN)
    assert greedy_tokens(logits).tolist() == expected.tolist()
    assert greedy_tokens(logits).dtype == np.int32


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_torch_argmax_on_random_rows(dtype: torch.dtype) -> None:
    logits = (torch.randn(50, 999, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
    for shifted in (logits, logits - 20, logits.abs() * -1):
        assert greedy_tokens(shifted).tolist() == shifted.float().argmax(dim=1).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("background", [-5.0, 0.0, 5.0])
def test_rows_that_are_not_finite_are_invalid_and_the_others_are_not(dtype: torch.dtype, background: float) -> None:
    logits = torch.full((6, 40), background, dtype=dtype)
    logits[0, 3] = float("nan")
    logits[1, 3] = torch.tensor(float("nan"), dtype=dtype).neg()
    logits[2, 3] = INFINITY
    logits[3] = -INFINITY
    logits[4, 3] = -INFINITY
    assert greedy_tokens(logits).tolist() == [INVALID_TOKEN] * 4 + [0, 0]


def test_the_negative_nan_of_a_division_is_found() -> None:
    zero = np.zeros(1, np.float32)
    with np.errstate(invalid="ignore"):
        nan = torch.from_numpy(-np.abs(zero / zero)).bfloat16()
    assert nan.view(torch.int16).item() < 0
    logits = torch.ones(1, 20, dtype=torch.bfloat16)
    logits[0, 5] = nan
    assert greedy_tokens(logits).tolist() == [INVALID_TOKEN]


def test_no_rows() -> None:
    assert greedy_tokens(torch.zeros(0, 5, dtype=torch.bfloat16)).tolist() == []
