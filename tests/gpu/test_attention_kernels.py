"""The GPU's attention against attention in float64: on the GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gpu.interpreter import DEVICE  # isort: skip
from batchpipe.attention import device_inputs, triton_attention
from batchpipe.attention.base import AttentionInputs, AttentionOptions
from batchpipe.attention.device_inputs import DeviceStepInputs
from batchpipe.attention.triton_attention import TILE_QUERIES, TritonAttention
from batchpipe.kv.pool import KvPool
from batchpipe.pipeline.model_runner.graphs import padding_of
from tests.attention.exact_attention import exact_attention
from tests.attention.paged_cases import PagedCase, attend_in_chunks

BACKEND = TritonAttention()
CHUNK_TOKENS = 64  # in these tests: the interpreter is slow


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_inputs, "CHUNK_TOKENS", CHUNK_TOKENS)
    monkeypatch.setattr(triton_attention, "CHUNK_TOKENS", CHUNK_TOKENS)


def moved(case: PagedCase) -> PagedCase:
    case.queries, case.keys, case.values = (part.to(DEVICE) for part in (case.queries, case.keys, case.values))
    case.sinks = None if case.sinks is None else case.sinks.to(DEVICE)
    return case


def check(case: PagedCase, chunk_tokens: int) -> None:
    exact = exact_attention(case)
    outputs = attend_in_chunks(BACKEND, moved(case), chunk_tokens)
    for output, (expected, bound) in zip(outputs, exact, strict=True):
        excess = ((output.cpu().double() - expected).abs() / bound).max().item()
        assert excess <= 1, f"{excess} times the rounding error that is possible"


@settings(max_examples=200 if DEVICE.type == "cuda" else 6)
@given(
    lengths=st.lists(st.integers(1, 60 if DEVICE.type == "cuda" else 14), min_size=1, max_size=2),
    group=st.sampled_from([1, 2, 3, 4, 7, 8]),
    block_tokens=st.sampled_from([1, 3, 16, 64]),
    num_kv_heads=st.integers(1, 2),
    head_dim=st.sampled_from([16, 48, 64, 80, 96, 128, 256]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    sliding_window=st.none() | st.integers(1, 50),
    softcap=st.none() | st.floats(1, 50),
    sinks=st.booleans(),
    chunk_tokens=st.sampled_from([6, 100]),
)
def test_any_step_is_exact_but_for_rounding(chunk_tokens: int, **shape: object) -> None:
    check(PagedCase.make(**shape), chunk_tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize("sliding_window", [None, 20, CHUNK_TOKENS + 7])
def test_long_decodes_are_added_up_from_chunks(sliding_window: int | None) -> None:
    lengths = [CHUNK_TOKENS + 1, 2 * CHUNK_TOKENS + 30, 5]
    case = PagedCase.make(lengths=lengths, group=2, block_tokens=16, num_kv_heads=1, sliding_window=sliding_window)
    exact = exact_attention(case)
    [(output, _)] = _steps(case, [[length - 1 for length in lengths]], is_padded=False)
    for i, (expected, bound) in enumerate(exact):
        assert ((output[i].cpu().double() - expected[-1]).abs() <= bound[-1]).all()


@pytest.mark.parametrize("lengths", [[76, 58, 46], [29, 5, 8, CHUNK_TOKENS + 3]])
def test_a_padded_step_gives_the_same_bits(lengths: list[int]) -> None:
    case = PagedCase.make(lengths=lengths, group=3, block_tokens=16, head_dim=32)
    cuts = [[length - 1 if i % 2 else length // 2 for i, length in enumerate(lengths)]]
    for (plain, pool), (padded, padded_pool) in zip(
        _steps(case, cuts, is_padded=False), _steps(case, cuts, is_padded=True), strict=True
    ):
        assert torch.equal(plain, padded)
        assert torch.equal(pool.data, padded_pool.data)


def test_a_staged_block_is_read_and_written_in_its_slots() -> None:
    """Entry ~slot: even layers stand in this layer slot of the pool, odd ones in the next."""
    case = PagedCase.make(lengths=[20], group=2, block_tokens=16, num_kv_heads=1)
    num_layers = 4
    outputs = []
    for tables in (np.array([[1, 2]], np.int32), np.array([[1, ~(3 * num_layers)]], np.int32)):
        pool = KvPool(5, num_layers, 1, 16, 16, torch.float32, DEVICE)
        inputs = DeviceStepInputs(DEVICE, 16, max_tokens=64, max_sequences=2, tile_queries=TILE_QUERIES)
        lengths = np.array([20], np.int32)
        at = inputs.fill(np.zeros(20, np.int32), lengths, 0 * lengths, tables, np.ones(1, np.bool_))
        of = AttentionInputs.of_device(at, pool, BACKEND, 0)
        parts = (case.queries.to(DEVICE), case.keys.to(DEVICE), case.values.to(DEVICE))
        outputs += [BACKEND.forward(of, layer, *parts, AttentionOptions(case.scale)) for layer in (0, 3)]
    assert torch.equal(pool.data[3, 0, 0, :, :4], case.keys[16:].transpose(0, 1).to(DEVICE))  # layer 0
    assert torch.equal(pool.data[3, 1, 0, :, :4], case.keys[16:].transpose(0, 1).to(DEVICE))  # layer 3
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def _steps(case: PagedCase, cuts: list[list[int]], *, is_padded: bool) -> list[tuple[torch.Tensor, KvPool]]:
    """After a step of each sequence's tokens up to its cut, one of the others: its output, and the pool."""
    case = moved(case)
    found = []
    for cut in cuts:
        num_kv_heads, head_dim = case.keys.shape[1:]
        pool = KvPool(case.tables.size + 1, 2, num_kv_heads, case.block_tokens, head_dim, case.keys.dtype, DEVICE)
        inputs = DeviceStepInputs(
            DEVICE, case.block_tokens, max_tokens=8192, max_sequences=16, tile_queries=TILE_QUERIES
        )
        first, lengths = np.array(cut, np.int32), np.array(case.lengths, np.int32)
        for new, context in ((first, 0 * first), (lengths - first, first)):
            rows = np.concatenate([np.arange(n) + case.starts[i] + context[i] for i, n in enumerate(new)])
            is_decode = new == 1
            items = (-(-(context + 1) // CHUNK_TOKENS))[is_decode]
            padding = padding_of(
                len(rows),
                len(new),
                int(items.sum()),
                int((-(-new // TILE_QUERIES))[~is_decode].sum()),
                has_long_decodes=bool((items > 1).any()),
            )
            at = inputs.fill(
                np.zeros(len(rows), np.int32), new, context, case.tables, np.ones(len(new), np.bool_),
                padding if is_padded else None,
            )  # fmt: skip
            parts = [part[rows] for part in (case.queries, case.keys, case.values)]
            if is_padded and padding is not None:
                parts = [
                    torch.cat([part, part.new_full((padding.num_tokens - len(part), *part.shape[1:]), 7)])
                    for part in parts
                ]
            of = AttentionInputs.of_device(at, pool, BACKEND, 0)
            options = AttentionOptions(case.scale, case.sliding_window)
            output = BACKEND.forward(of, 1, parts[0], parts[1], parts[2], options)[: len(rows)]
        found.append((output, pool))
    return found
