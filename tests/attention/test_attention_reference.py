"""The yardstick against attention written as a loop over tokens, and the step's indices against hand-made ones."""

import math

import numpy as np
import pytest
import torch

from batchpipe.attention.reference import ReferenceAttention
from batchpipe.attention.step_inputs import StepInputs
from batchpipe.kv.pool import KvPool
from tests.attention.exact_attention import exact_attention
from tests.attention.paged_cases import PagedCase, attend_in_chunks


def attend_token_by_token(case: PagedCase, sequence: int) -> torch.Tensor:
    """[length, Hq, D] in float64."""
    query, key, value = (tensor.double() for tensor in case.sequence(sequence))
    group = query.shape[1] // key.shape[1]
    output = torch.zeros_like(query)
    for position in range(len(query)):
        first = 0 if case.sliding_window is None else max(0, position + 1 - case.sliding_window)
        for head in range(query.shape[1]):
            scores = key[first : position + 1, head // group] @ query[position, head] * case.scale
            if case.softcap is not None:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            weights = scores.exp()
            total = weights.sum() + (0 if case.sinks is None else math.exp(case.sinks[head].item()))
            output[position, head] = weights @ value[first : position + 1, head // group] / total
    return output


@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (3.0, False), (None, True), (2.0, True)])
@pytest.mark.parametrize("sliding_window", [None, 1, 5])
@pytest.mark.parametrize("block_tokens", [1, 16])
def test_equals_a_loop_over_tokens(
    softcap: float | None, sinks: bool, sliding_window: int | None, block_tokens: int
) -> None:
    case = PagedCase.make(
        lengths=[1, 7, 20],
        group=2,
        block_tokens=block_tokens,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=sinks,
    )
    outputs = attend_in_chunks(ReferenceAttention(), case, chunk_tokens=6)
    for sequence, (output, (exact, _)) in enumerate(zip(outputs, exact_attention(case), strict=True)):
        expected = attend_token_by_token(case, sequence)
        torch.testing.assert_close(output.double(), expected, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(exact, expected)


def test_new_tokens_stand_behind_their_context() -> None:
    pool = KvPool(9, 1, 1, 4, 16, torch.float32)
    inputs = StepInputs(pool).fill(
        np.array([3, 1], np.int32),
        np.array([2, 8], np.int32),
        np.array([[5, 1, 0], [2, 3, 8]], np.int32),
        backend=ReferenceAttention(),
    )
    assert inputs.positions.tolist() == [2, 3, 4, 8]
    blocks, rows = inputs.slots
    assert blocks.tolist() == [5, 5, 1, 8]
    assert rows.tolist() == [2, 3, 0, 0]
    assert inputs.num_tokens == 4


def test_a_short_block_table_is_our_mistake() -> None:
    pool = KvPool(9, 1, 1, 4, 16, torch.float32)
    one = np.array([1], np.int32)
    with pytest.raises(AssertionError, match="block table is too short"):
        StepInputs(pool).fill(one, 8 * one, np.array([[5, 1]], np.int32), backend=ReferenceAttention())
