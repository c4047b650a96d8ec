"""The C kernels against the yardstick, over whatever a step can be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.attention.cpu import CpuAttention
from batchpipe.attention.reference import ReferenceAttention
from tests.attention.paged_cases import PagedCase, attend_in_chunks

cpu_attention = CpuAttention.open()
pytestmark = pytest.mark.skipif(cpu_attention is None, reason="no C compiler")

cases = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 150), min_size=1, max_size=5),
        "group": st.integers(1, 16),
        "block_tokens": st.sampled_from([1, 3, 16, 64, 256]),
        "num_kv_heads": st.integers(1, 3),
        "head_dim": st.sampled_from([16, 32, 48, 64, 80, 96, 128, 256]),
        "sliding_window": st.none() | st.integers(1, 100),
        "softcap": st.none() | st.floats(1, 50),
        "sinks": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)


@given(case=cases, chunk_tokens=st.integers(1, 150))
@settings(max_examples=60, deadline=None)
def test_float32_equals_the_reference(case: dict[str, object], chunk_tokens: int) -> None:
    paged = PagedCase.make(**case)
    outputs = attend_in_chunks(cpu_attention, paged, chunk_tokens)
    for output, expected in zip(outputs, attend_in_chunks(ReferenceAttention(), paged, 150), strict=True):
        torch.testing.assert_close(output, expected, atol=3e-6, rtol=1e-5)


@given(case=cases, chunk_tokens=st.integers(1, 150))
@settings(max_examples=60, deadline=None)
def test_bfloat16_is_near_the_reference_in_float32(case: dict[str, object], chunk_tokens: int) -> None:
    paged = PagedCase.make(**case, dtype=torch.bfloat16)
    exact = PagedCase.make(**case, dtype=torch.bfloat16)
    for name in ("queries", "keys", "values"):
        setattr(exact, name, getattr(exact, name).float())
    outputs = attend_in_chunks(cpu_attention, paged, chunk_tokens)
    for output, expected in zip(outputs, attend_in_chunks(ReferenceAttention(), exact, 150), strict=True):
        torch.testing.assert_close(output.float(), expected, atol=2e-2, rtol=1e-2)
