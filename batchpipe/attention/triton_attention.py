"""Attention on a GPU by the kernels of `triton_kernels`: two launches a layer, three where a decode is long."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from batchpipe.attention.base import AttentionInputs, AttentionOptions
from batchpipe.attention.device_inputs import CHUNK_TOKENS, DeviceInputs
from batchpipe.attention.triton_kernels import (
    combine_kernel,
    decode_kernel,
    prefill_kernel,
    rounded_up,
    write_kernel,
)
from batchpipe.kv.pool import KEY, VALUE

# New tokens of a prompt that one program takes; times its query heads, the rows of its products.
TILE_QUERIES = 64
# Compute capabilities whose multiprocessors hold the 128 KiB that a program of 256 rows keeps; others get 128 rows.
_LARGE = (9, 10)


class TritonAttention:
    """See `AttentionBackend`. Reads `AttentionInputs.on_device` alone, so that a step of it can be recorded."""

    name = "triton"
    default_block_tokens = 16

    def forward(
        self, inputs: AttentionInputs, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        self.write(inputs, layer, key, value)
        return self.attend(inputs, layer, query, options)

    def write(self, inputs: AttentionInputs, layer: int, key: Tensor, value: Tensor) -> None:
        """New tokens' key and value [T, Hkv, D] to their blocks."""
        pool, at = inputs.pool, inputs.on_device
        assert at is not None and len(key) == len(at.token_ids) and key.stride(2) == value.stride(2) == 1
        _, _, _, num_heads, _, head_dim = pool.data.shape
        write_kernel[(len(key),)](
            pool.data, key, value, at.token_entries, at.token_rows, layer, *pool_strides(inputs),
            key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            HEADS=num_heads, HEADS_UP=triton.next_power_of_2(num_heads),
            D=head_dim, WIDTH=rounded_up(head_dim), num_warps=4,
        )  # fmt: skip

    def attend(self, inputs: AttentionInputs, layer: int, query: Tensor, options: AttentionOptions) -> Tensor:
        """query [T, Hq, D] -> [T, Hq, D], once the new tokens' KV is written."""
        at = inputs.on_device
        assert at is not None and len(query) == len(at.token_ids) and query.stride(2) == 1
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if len(at.item_sequences):
            self._decode(inputs, at, layer, query, output, options)
        if len(at.tile_sequences):
            self._prefill(inputs, at, layer, query, output, options)
        return output

    def _decode(
        self, inputs: AttentionInputs, at: DeviceInputs, layer: int, query: Tensor, output: Tensor,
        options: AttentionOptions,
    ) -> None:  # fmt: skip
        pool = inputs.pool
        _, num_heads, head_dim = query.shape
        group, width = num_heads // pool.num_kv_heads, rounded_up(head_dim)
        wide = query.dtype == torch.float32 or head_dim > 128
        partial, sums = (output, output)
        if at.has_long_decodes:
            partial, sums = _room(len(at.item_sequences), num_heads, query)
        decode_kernel[(pool.num_kv_heads, len(at.item_sequences))](
            output, partial, sums, query, pool.data, at.item_sequences, at.item_chunks, at.first_items,
            at.query_starts, at.context_lengths, at.tables, at.table_starts,
            query if options.sinks is None else options.sinks, options.scale, options.softcap or 1.0,
            query.stride(0), query.stride(1), layer, *pool_strides(inputs),
            GROUP=group, D=head_dim, WIDTH=width, BLOCK_TOKENS=pool.block_tokens, ROWS=rounded_up(group),
            KEYS=32 if wide else 64, CHUNK=CHUNK_TOKENS, WINDOW=options.sliding_window or 0,
            HAS_SOFTCAP=options.softcap is not None, HAS_SINKS=options.sinks is not None,
            EXACT=query.dtype == torch.float32, num_warps=4, num_stages=2,
        )  # fmt: skip
        if at.has_long_decodes:
            combine_kernel[(num_heads, len(at.query_starts))](
                output, partial, sums, at.first_items, at.query_starts, D=head_dim, WIDTH=width, num_warps=1
            )

    def _prefill(
        self, inputs: AttentionInputs, at: DeviceInputs, layer: int, query: Tensor, output: Tensor,
        options: AttentionOptions,
    ) -> None:  # fmt: skip
        pool = inputs.pool
        _, num_heads, head_dim = query.shape
        group = num_heads // pool.num_kv_heads
        wide = query.dtype == torch.float32 or head_dim > 128
        heads = min(triton.next_power_of_2(group), 1 if wide else 4 if _has_large_tiles(query.device) else 2)
        rows = TILE_QUERIES * heads
        num_parts = -(-group // heads)
        prefill_kernel[(pool.num_kv_heads * num_parts, len(at.tile_sequences))](
            output, query, pool.data, at.tile_sequences, at.tile_firsts, at.query_starts, at.query_lengths,
            at.context_lengths, at.tables, at.table_starts, query if options.sinks is None else options.sinks,
            options.scale, options.softcap or 1.0, query.stride(0), query.stride(1), layer, *pool_strides(inputs),
            GROUP=group, HEADS=heads, NUM_HEADS=num_heads, D=head_dim, WIDTH=rounded_up(head_dim),
            BLOCK_TOKENS=pool.block_tokens, QUERIES=TILE_QUERIES, ROWS=rows, KEYS=32 if wide else 64,
            WINDOW=options.sliding_window or 0, HAS_SOFTCAP=options.softcap is not None,
            HAS_SINKS=options.sinks is not None, EXACT=query.dtype == torch.float32,
            num_warps=8 if rows > 128 else 4, num_stages=2,
        )  # fmt: skip


@functools.cache
def _has_large_tiles(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in _LARGE


def _room(num_items: int, num_heads: int, query: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [I, Hq, D] and [I, Hq, 2] for the chunks of long decodes."""
    shape = (num_items, num_heads, query.shape[2])
    partial = torch.empty(shape, dtype=torch.float32, device=query.device)
    return partial, torch.empty(num_items, num_heads, 2, dtype=torch.float32, device=query.device)


def pool_strides(inputs: AttentionInputs) -> tuple[int, int, int, int]:
    """Layers of a block, and in numbers: a layer of a block, a head of a layer, from a key to its value."""
    data = inputs.pool.data
    assert data.is_contiguous()
    return data.shape[1], data.stride(1), data.stride(3), (VALUE - KEY) * data.stride(2)
