"""Attention by the C kernels of native/attention.c: decodes at the speed of memory, prefill chunks in the same call."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from batchpipe.attention.base import AttentionInputs, AttentionOptions
from batchpipe.attention.block_tokens import CPU_KERNELS_BLOCK_TOKENS, cpu_kernels_serve
from batchpipe.native.build import load_kernels

MAX_GROUP = 32
MAX_BLOCK_TOKENS = 256
NO_WINDOW = 1 << 40


class _AttentionStep(ctypes.Structure):
    """`struct attention_step` of native/attention.c, field by field."""

    _fields_ = [
        ("query_starts", c_void_p),
        ("context_lengths", c_void_p),
        ("block_tables", c_void_p),
        ("num_sequences", c_int64),
        ("table_width", c_int64),
        ("blocks", c_void_p),
        ("block_stride", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("block_tokens", c_int64),
        ("query", c_void_p),
        ("key", c_void_p),
        ("value", c_void_p),
        ("query_token_stride", c_int64),
        ("query_head_stride", c_int64),
        ("key_token_stride", c_int64),
        ("key_head_stride", c_int64),
        ("value_token_stride", c_int64),
        ("value_head_stride", c_int64),
        ("output", c_void_p),
        ("sinks", c_void_p),
        ("sliding_window", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("num_threads", c_int64),
    ]


class CpuAttention:
    """See `AttentionBackend`. `supports` says for which types and heads."""

    name = "cpu"
    default_block_tokens = CPU_KERNELS_BLOCK_TOKENS

    def __init__(self, kernels: ctypes.CDLL) -> None:
        self._functions = {
            torch.float32: kernels.batchpipe_attention_float32,
            torch.bfloat16: kernels.batchpipe_attention_bfloat16,
        }

    @staticmethod
    def supports(dtype: torch.dtype, head_dim: int) -> bool:
        return cpu_kernels_serve(str(dtype).removeprefix("torch."), head_dim)

    @classmethod
    def open(cls) -> CpuAttention | None:
        """None if the kernels cannot be compiled; the log says why."""
        kernels = load_kernels()
        return None if kernels is None else cls(kernels)

    def forward(
        self, inputs: AttentionInputs, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        pool = inputs.pool
        num_tokens, num_heads, head_dim = query.shape
        assert query.dtype == key.dtype == value.dtype == pool.dtype, "attention computes in the pool's dtype"
        assert num_tokens == len(key) == len(value) == inputs.num_tokens and head_dim == pool.head_dim
        assert num_heads <= MAX_GROUP * pool.num_kv_heads and pool.block_tokens <= MAX_BLOCK_TOKENS
        query, key, value = (tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in (query, key, value))
        blocks, tables = inputs.blocks_of(layer)
        output = torch.empty(query.shape, dtype=query.dtype)
        sinks = None if options.sinks is None else options.sinks.detach().float().contiguous()
        step = _AttentionStep(
            query_starts=inputs.query_starts.data_ptr(),
            context_lengths=inputs.context_lengths.data_ptr(),
            block_tables=tables.data_ptr(),
            num_sequences=len(inputs.query_lengths),
            table_width=tables.stride(0),
            blocks=blocks.data_ptr(),
            block_stride=blocks.stride(0),
            num_heads=num_heads,
            num_kv_heads=pool.num_kv_heads,
            head_dim=head_dim,
            block_tokens=pool.block_tokens,
            query=query.data_ptr(),
            key=key.data_ptr(),
            value=value.data_ptr(),
            query_token_stride=query.stride(0),
            query_head_stride=query.stride(1),
            key_token_stride=key.stride(0),
            key_head_stride=key.stride(1),
            value_token_stride=value.stride(0),
            value_head_stride=value.stride(1),
            output=output.data_ptr(),
            sinks=None if sinks is None else sinks.data_ptr(),
            sliding_window=options.sliding_window or NO_WINDOW,
            scale=options.scale,
            softcap=options.softcap or 0.0,
            num_threads=torch.get_num_threads(),
        )
        if self._functions[pool.dtype](ctypes.byref(step)) != 0:
            raise MemoryError("no memory for the list of attention tiles")
        return output
