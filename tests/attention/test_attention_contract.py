"""What `AttentionBackend` promises, kept by every backend over whatever a step can be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from batchpipe.attention.base import AttentionBackend
from batchpipe.attention.cpu import CpuAttention
from batchpipe.attention.reference import ReferenceAttention
from tests.attention.exact_attention import exact_attention
from tests.attention.paged_cases import PagedCase, attend_in_chunks

cpu_attention = CpuAttention.open()
needs_compiler = pytest.mark.skipif(cpu_attention is None, reason="no C compiler")

every_backend = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(cpu_attention, torch.float32, marks=needs_compiler, id="cpu-float32"),
        pytest.param(cpu_attention, torch.bfloat16, marks=needs_compiler, id="cpu-bfloat16"),
        pytest.param(ReferenceAttention(), torch.float32, id="reference-float32"),
        pytest.param(ReferenceAttention(), torch.bfloat16, id="reference-bfloat16"),
        pytest.param(ReferenceAttention(), torch.float16, id="reference-float16"),
    ],
)


def paged_cases(dtype: torch.dtype) -> st.SearchStrategy[PagedCase]:
    return st.builds(
        PagedCase.make,
        lengths=st.lists(st.integers(1, 150), min_size=1, max_size=5),
        group=st.integers(1, 16),
        block_tokens=st.sampled_from([1, 3, 16, 64, 256]),
        num_kv_heads=st.integers(1, 3),
        head_dim=st.sampled_from([16, 32, 48, 64, 80, 96, 128, 256]),
        dtype=st.just(dtype),
        sliding_window=st.none() | st.integers(1, 100),
        softcap=st.none() | st.floats(1, 50),
        sinks=st.booleans(),
        seed=st.integers(0, 1000),
    )


def check(backend: AttentionBackend, case: PagedCase, chunk_tokens: int) -> None:
    outputs = attend_in_chunks(backend, case, chunk_tokens)
    for output, (exact, bound) in zip(outputs, exact_attention(case), strict=True):
        excess = ((output.double() - exact).abs() / bound).max().item()
        assert excess <= 1, f"{excess} times the rounding error that is possible"


@every_backend
def test_any_step_is_exact_but_for_rounding(backend: AttentionBackend, dtype: torch.dtype) -> None:
    @settings(max_examples=60 if backend is cpu_attention else 15)
    @given(case=paged_cases(dtype), chunk_tokens=st.integers(1, 150))
    def holds(case: PagedCase, chunk_tokens: int) -> None:
        check(backend, case, chunk_tokens)

    holds()


@every_backend
@pytest.mark.parametrize("sliding_window", [2, 3])
def test_wide_heads_with_a_short_window(backend: AttentionBackend, dtype: torch.dtype, sliding_window: int) -> None:
    """Few keys share the weight and a score sums 256 products: the output's error is at its largest."""
    case = PagedCase.make(
        lengths=[1, 3, 128, 128, 128],
        group=2,
        block_tokens=16,
        num_kv_heads=3,
        head_dim=256,
        dtype=dtype,
        sliding_window=sliding_window,
        seed=127,
    )
    check(backend, case, chunk_tokens=150)


@every_backend
def test_rows_may_be_strided(backend: AttentionBackend, dtype: torch.dtype) -> None:
    """Query, key and value are parts of one projection's output in most models."""
    case = PagedCase.make(lengths=[5, 40], group=3, block_tokens=16, dtype=dtype, sinks=True)
    num_heads, num_kv_heads = case.queries.shape[1], case.keys.shape[1]
    projected = torch.cat([case.queries, case.keys, case.values], dim=1)
    parts = projected.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    case.queries, case.keys, case.values = parts
    assert not any(part.is_contiguous() for part in parts)
    check(backend, case, chunk_tokens=40)


@every_backend
def test_the_same_step_gives_the_same_bits(backend: AttentionBackend, dtype: torch.dtype) -> None:
    case = PagedCase.make(lengths=[1, 70, 20], group=4, block_tokens=16, head_dim=64, dtype=dtype)

    def bits(outputs: list[Tensor]) -> list[Tensor]:
        return [output.view(torch.uint8) for output in outputs]

    first, second = (bits(attend_in_chunks(backend, case, 30)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
