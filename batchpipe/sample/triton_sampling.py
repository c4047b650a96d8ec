"""Sampling one token a row on a GPU, in Triton: one program a row, no sorting, no wait.

A truncation keeps all tokens at or above some level, as in `draw`. The level is found by bisection over the bits of
the logits: each round counts, or sums the weights of, the tokens above its middle. All sums of a row are taken in an
order that depends on the row alone, so its token does not depend on its batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
# Bits that are zero in every number of the type once it is float32, and so need no round.
_ZERO_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


@triton.jit
def _ordered(values, ZERO_BITS: tl.constexpr):
    """Integers in the order of the float32 values."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)  # -0.0 and 0.0 are one level
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> ZERO_BITS


@triton.jit
def _amount_above(
    row, level, kept_level, best, inverse_temperature, width,
    COUNTS: tl.constexpr, ZERO_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The number, or the weight, of the tokens at `level` or above, of those at `kept_level` or above."""
    amount = 0.0
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(row + at, mask=at < width, other=-float("inf")).to(tl.float32)
        ordered = _ordered(values, ZERO_BITS)
        is_above = (ordered >= level) & (ordered >= kept_level) & (at < width)
        if COUNTS:
            amount += tl.sum(is_above.to(tl.float32), 0)  # exact below 2**24
        else:
            amount += tl.sum(tl.where(is_above, tl.exp((values - best) * inverse_temperature), 0.0), 0)
    return amount


@triton.jit
def _highest_level(
    row, wanted, kept_level, best, inverse_temperature, width,
    COUNTS: tl.constexpr, ZERO_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The highest level above which there is at least `wanted`, or the lowest level of all."""
    low = tl.full([], -(1 << (31 - ZERO_BITS)), tl.int64)
    high = tl.full([], (1 << (31 - ZERO_BITS)) - 1, tl.int64)
    for _ in range(32 - ZERO_BITS):
        middle = low + (high - low + 1) // 2
        amount = _amount_above(
            row, middle.to(tl.int32), kept_level, best, inverse_temperature, width, COUNTS, ZERO_BITS, BLOCK
        )
        is_enough = amount >= wanted
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle - 1)
    return low.to(tl.int32)


@triton.jit
def sample_kernel(
    tokens, logits, row_stride, width, temperatures, top_ks, top_ps, min_ps, uniforms,
    GREEDY: tl.constexpr, ZERO_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (rows,). The lowest index of the largest where the temperature is 0; -1 where a row is not finite."""
    index = tl.program_id(0)
    row = logits + index.to(tl.int64) * row_stride
    best = -float("inf")
    best_at = 0
    num_nan = 0
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(row + at, mask=at < width, other=-float("inf")).to(tl.float32)
        num_nan += tl.sum((values != values).to(tl.int32), 0)
        block_best = tl.max(values, 0)
        block_at = tl.min(tl.where(values == block_best, at, width), 0)
        best_at = tl.where(block_best > best, block_at, best_at)
        best = tl.maximum(best, block_best)
    is_finite = (num_nan == 0) & (best > -float("inf")) & (best < float("inf"))
    token = tl.where(is_finite, best_at, -1)
    if not GREEDY:
        temperature = tl.load(temperatures + index)
        if is_finite & (temperature > 0.0):
            scale = 1.0 / temperature
            top_k, top_p, min_p = tl.load(top_ks + index), tl.load(top_ps + index), tl.load(min_ps + index)
            level = tl.full([], -(1 << (31 - ZERO_BITS)), tl.int32)
            if (top_k > 0.0) & (top_k < width):
                level = _highest_level(row, top_k, level, best, scale, width, True, ZERO_BITS, BLOCK)
            if top_p < 1.0:
                total = _amount_above(row, level, level, best, scale, width, False, ZERO_BITS, BLOCK)
                found = _highest_level(row, top_p * total, level, best, scale, width, False, ZERO_BITS, BLOCK)
                level = tl.maximum(level, found)
            kept = 0.0
            for start in range(0, width, BLOCK):
                at = start + tl.arange(0, BLOCK)
                values = tl.load(row + at, mask=at < width, other=-float("inf")).to(tl.float32)
                weights = tl.exp((values - best) * scale)
                is_kept = (_ordered(values, ZERO_BITS) >= level) & (weights >= min_p) & (at < width)
                kept += tl.sum(tl.where(is_kept, weights, 0.0), 0)
            target = tl.load(uniforms + index) * kept
            before = 0.0
            drawn = width
            last = best_at
            for start in range(0, width, BLOCK):
                at = start + tl.arange(0, BLOCK)
                values = tl.load(row + at, mask=at < width, other=-float("inf")).to(tl.float32)
                weights = tl.exp((values - best) * scale)
                is_kept = (_ordered(values, ZERO_BITS) >= level) & (weights >= min_p) & (weights > 0.0) & (at < width)
                weights = tl.where(is_kept, weights, 0.0)
                is_past = is_kept & (before + tl.cumsum(weights, 0) > target)
                drawn = tl.minimum(drawn, tl.min(tl.where(is_past, at, width), 0))
                last = tl.maximum(last, tl.max(tl.where(is_kept, at, 0), 0))
                before += tl.sum(weights, 0)
            token = tl.where(drawn < width, drawn, last)  # rounding carried the target past the end
    tl.store(tokens + index, token)


def launch_sampling(tokens: Tensor, logits: Tensor, parameters: Tensor | None) -> None:
    """Writes one token a row to tokens [N], int32, -1 where a row of logits [N, V] is not finite.

    parameters: float32 [5, N], all on the device: temperature, top_k, top_p, min_p, uniform; None: all rows are greedy.
    """
    assert logits.stride(1) == 1 and len(tokens) == len(logits)
    used = logits.new_empty(0, dtype=torch.float32) if parameters is None else parameters
    columns = [used] * 5 if parameters is None else list(parameters)
    sample_kernel[(len(logits),)](
        tokens, logits, logits.stride(0), logits.shape[1], *columns,
        GREEDY=parameters is None, ZERO_BITS=_ZERO_BITS[logits.dtype], BLOCK=_BLOCK, num_warps=16,
    )  # fmt: skip
