"""The parts of a decoder layer between its products and its attention, in Triton. Each is one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from batchpipe.attention.base import AttentionInputs
from batchpipe.attention.triton_attention import pool_strides
from batchpipe.attention.triton_kernels import layer_address

_HEADS_PER_PROGRAM = 8
_ACTIVATION_BLOCK = 1024


@triton.jit
def norm_kernel(
    hidden, residual, summed, output, weight, epsilon, width,
    ADDS: tl.constexpr, ROUNDED_FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: output = norm(hidden + residual) * weight, and the sum itself. Grid: (rows,)."""
    at = tl.program_id(0).to(tl.int64) * width + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK)
    shown = columns < width
    numbers = tl.load(hidden + at, mask=shown, other=0.0).to(tl.float32)
    if ADDS:
        numbers += tl.load(residual + at, mask=shown, other=0.0).to(tl.float32)
        rounded = numbers.to(summed.dtype.element_ty)
        tl.store(summed + at, rounded, mask=shown)
        numbers = rounded.to(tl.float32)
    numbers *= tl.rsqrt(tl.sum(numbers * numbers, 0) / width + epsilon)
    if ROUNDED_FIRST:
        numbers = numbers.to(output.dtype.element_ty).to(tl.float32)
    numbers *= tl.load(weight + columns, mask=shown, other=0.0)
    tl.store(output + at, numbers.to(output.dtype.element_ty), mask=shown)


@triton.jit
def _normed(
    first, second, weight, first_at, second_at, shown, epsilon,
    D: tl.constexpr, ELEMENT: tl.constexpr, ROUNDED_FIRST: tl.constexpr,
):  # fmt: skip
    """Both halves of heads [heads, D / 2], each head normed over D."""
    squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
    scale = tl.rsqrt(squares / D + epsilon)[:, None]
    first, second = first * scale, second * scale
    if ROUNDED_FIRST:
        first = first.to(ELEMENT).to(tl.float32)
        second = second.to(ELEMENT).to(tl.float32)
    first *= tl.load(weight + first_at, mask=shown, other=0.0)[None, :]
    second *= tl.load(weight + second_at, mask=shown, other=0.0)[None, :]
    return first, second


@triton.jit(do_not_specialize=["layer"])
def rotate_kernel(
    heads, cosines, sines, pool, token_entries, token_rows, query_norm, key_norm, epsilon,
    layer, num_layers, layer_stride, head_stride, value_offset, token_stride, angle_stride,
    NUM_QUERY: tl.constexpr, NUM_KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HALF_UP: tl.constexpr,
    REST_UP: tl.constexpr, WRITES: tl.constexpr, NORMS: tl.constexpr, ROUNDED_FIRST: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Rotates the first 2 * HALF numbers of every query and key head in place; WRITES keys and values to the pool.

    heads: query, key and value heads of a token one behind the other. Grid: (tokens, parts of its heads).
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_rotated = head < NUM_QUERY + NUM_KV
    is_key = is_rotated & (head >= NUM_QUERY)
    is_value = (head >= NUM_QUERY + NUM_KV) & (head < NUM_QUERY + 2 * NUM_KV)
    half = tl.arange(0, HALF_UP)
    shown = half < HALF
    at = heads + token * token_stride + head[:, None] * D + half[None, :]
    mask = is_rotated[:, None] & shown[None, :]
    element: tl.constexpr = heads.dtype.element_ty
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    if NORMS:  # of whole heads: 2 * HALF is D
        query_first, query_second = _normed(
            first, second, query_norm, half, half + HALF, shown, epsilon, D, element, ROUNDED_FIRST
        )
        key_first, key_second = _normed(
            first, second, key_norm, half, half + HALF, shown, epsilon, D, element, ROUNDED_FIRST
        )
        first = tl.where(is_key[:, None], key_first, query_first).to(element).to(tl.float32)
        second = tl.where(is_key[:, None], key_second, query_second).to(element).to(tl.float32)
    angle = token * angle_stride + half
    first_cosine = tl.load(cosines + angle, mask=shown, other=0.0).to(tl.float32)
    second_cosine = tl.load(cosines + angle + HALF, mask=shown, other=0.0).to(tl.float32)
    first_sine = tl.load(sines + angle, mask=shown, other=0.0).to(tl.float32)
    second_sine = tl.load(sines + angle + HALF, mask=shown, other=0.0).to(tl.float32)
    new_first = (first * first_cosine[None, :] - second * first_sine[None, :]).to(element)
    new_second = (second * second_cosine[None, :] + first * second_sine[None, :]).to(element)
    tl.store(at, new_first, mask=mask)
    tl.store(at + HALF, new_second, mask=mask)
    if WRITES:
        row = tl.load(token_rows + token)
        if row >= 0:
            place = layer_address(tl.load(token_entries + token), layer, num_layers, layer_stride) + row * D
            kv_head = tl.where(is_value, head - NUM_QUERY - NUM_KV, head - NUM_QUERY)
            target = pool + place + kv_head[:, None] * head_stride + half[None, :]
            key_mask = is_key[:, None] & shown[None, :]
            tl.store(target, new_first, mask=key_mask)
            tl.store(target + HALF, new_second, mask=key_mask)
            value_mask = is_value[:, None] & shown[None, :]
            tl.store(target + value_offset, tl.load(at, mask=value_mask), mask=value_mask)
            tl.store(target + value_offset + HALF, tl.load(at + HALF, mask=value_mask), mask=value_mask)
            if REST_UP > 0:  # what is behind the rotated part of keys and values
                rest = 2 * HALF + tl.arange(0, REST_UP)
                source = heads + token * token_stride + head[:, None] * D + rest[None, :]
                rest_target = pool + place + kv_head[:, None] * head_stride + rest[None, :]
                rest_target += tl.where(is_value, value_offset, 0)[:, None]
                rest_mask = (is_key | is_value)[:, None] & (rest < D)[None, :]
                tl.store(rest_target, tl.load(source, mask=rest_mask), mask=rest_mask)


@triton.jit
def gated_kernel(gate_up, output, width, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """output = activation(gate) * up, of rows of gate and up one behind the other. Grid: (rows, parts)."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    shown = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=shown, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=shown, other=0.0).to(tl.float32)
    if GELU:  # by tanh
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        active = gate * tl.sigmoid(2.0 * inner)
    else:
        active = gate * tl.sigmoid(gate)
    active = active.to(output.dtype.element_ty).to(tl.float32)
    tl.store(output + row * width + at, (active * up).to(output.dtype.element_ty), mask=shown)


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float, *, rounded_first: bool) -> Tensor:
    """hidden [..., H], weight float32 [H] -> [..., H]. rounded_first: to the hidden states' type before the weight."""
    hidden = hidden.contiguous()
    output = torch.empty_like(hidden)
    _launch_norm(hidden, hidden, output, output, weight, epsilon, rounded_first, adds=False)
    return output


def add_rms_norm(
    hidden: Tensor, residual: Tensor, weight: Tensor, epsilon: float, *, rounded_first: bool
) -> tuple[Tensor, Tensor]:
    """(the norm of hidden + residual, hidden + residual), each [..., H]."""
    hidden, residual = hidden.contiguous(), residual.contiguous()
    summed, output = torch.empty_like(hidden), torch.empty_like(hidden)
    _launch_norm(hidden, residual, summed, output, weight, epsilon, rounded_first, adds=True)
    return output, summed


def _launch_norm(
    hidden: Tensor, residual: Tensor, summed: Tensor, output: Tensor, weight: Tensor, epsilon: float,
    rounded_first: bool, *, adds: bool,
) -> None:  # fmt: skip
    width = hidden.shape[-1]
    norm_kernel[(hidden.numel() // width,)](
        hidden, residual, summed, output, weight, epsilon, width, ADDS=adds, ROUNDED_FIRST=rounded_first,
        BLOCK=triton.next_power_of_2(width), num_warps=8 if width > 2048 else 4,
    )  # fmt: skip


def gated(gate_up: Tensor, *, gelu: bool) -> Tensor:
    """[..., 2 * I] -> [..., I]: silu, or gelu by tanh, of the first half times the second."""
    width = gate_up.shape[-1] // 2
    output = gate_up.new_empty(*gate_up.shape[:-1], width)
    grid = (output.numel() // width, triton.cdiv(width, _ACTIVATION_BLOCK))
    gated_kernel[grid](gate_up, output, width, GELU=gelu, BLOCK=_ACTIVATION_BLOCK, num_warps=4)
    return output


class HeadNorms:
    """Norms of every query and every key head before the rotation, as Qwen3 has them. Weights float32 [D]."""

    def __init__(self, query: Tensor, key: Tensor, epsilon: float, *, rounded_first: bool) -> None:
        self.query, self.key, self.epsilon, self.rounded_first = query, key, epsilon, rounded_first


def rotate(
    heads: Tensor, cosines: Tensor, sines: Tensor, num_query: int, num_kv: int, norms: HeadNorms | None,
    write_to: tuple[AttentionInputs, int] | None,
) -> None:  # fmt: skip
    """Rotates query and key heads in place, and writes keys and values to their blocks of the pool.

    heads [T, Hq + 2 Hkv, D], contiguous; cosines, sines [T, R], R at most D. write_to: the step's inputs and the layer
    of the pool; None: nothing is written.
    """
    num_tokens, _, head_dim = heads.shape
    half = cosines.shape[-1] // 2
    assert (
        heads.is_contiguous() and cosines.stride(-1) == sines.stride(-1) == 1 and cosines.stride(0) == sines.stride(0)
    )
    assert norms is None or 2 * half == head_dim
    entries = rows = pool = heads
    layer, strides = 0, (0, 0, 0, 0)
    if write_to is not None:
        inputs, layer = write_to
        assert inputs.on_device is not None and len(inputs.on_device.token_rows) == num_tokens
        entries, rows, pool = inputs.on_device.token_entries, inputs.on_device.token_rows, inputs.pool.data
        strides = pool_strides(inputs)
    rest = head_dim - 2 * half
    rotate_kernel[(num_tokens, triton.cdiv(num_query + 2 * num_kv, _HEADS_PER_PROGRAM))](
        heads, cosines, sines, pool, entries, rows,
        heads if norms is None else norms.query, heads if norms is None else norms.key,
        0.0 if norms is None else norms.epsilon, layer, *strides, heads.stride(0), cosines.stride(0),
        NUM_QUERY=num_query, NUM_KV=num_kv, D=head_dim, HALF=half, HALF_UP=triton.next_power_of_2(half),
        REST_UP=triton.next_power_of_2(rest) if rest else 0, WRITES=write_to is not None, NORMS=norms is not None,
        ROUNDED_FIRST=norms is not None and norms.rounded_first, HEADS=_HEADS_PER_PROGRAM, num_warps=4,
    )  # fmt: skip
