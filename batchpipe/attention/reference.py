"""The reference: gathers each sequence's KV, then plain attention. For any device and dtype, and slow."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from batchpipe.attention.base import AttentionInputs, AttentionOptions
from batchpipe.attention.block_tokens import BLOCK_TOKENS
from batchpipe.kv.pool import KEY, VALUE


class ReferenceAttention:
    """See `AttentionBackend`."""

    name = "reference"
    default_block_tokens = BLOCK_TOKENS

    def forward(
        self, inputs: AttentionInputs, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        layer_blocks, tables = inputs.blocks_of(layer)
        blocks, rows = inputs.slots_of(layer)
        layer_blocks[blocks, KEY, :, rows] = key
        layer_blocks[blocks, VALUE, :, rows] = value

        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        starts = inputs.query_starts.tolist()
        contexts = inputs.context_lengths.tolist()
        tables = tables.to(query.device)
        for sequence, context in enumerate(contexts):
            first, end = starts[sequence], starts[sequence + 1]
            keys, values = _gather(layer_blocks, tables[sequence], context + end - first)
            mask = _causal_mask(end - first, context, options.sliding_window, query.device)
            queries = query[first:end].transpose(0, 1)  # [Hq, queries, D]
            if options.softcap is None and options.sinks is None:
                attended = scaled_dot_product_attention(
                    queries[None], keys[None], values[None], attn_mask=mask, scale=options.scale, enable_gqa=True
                )[0]
            else:
                attended = _plain_attention(queries, keys, values, mask, options)
            output[first:end] = attended.transpose(0, 1)
        return output


def _gather(layer_blocks: Tensor, table: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values [Hkv, num_tokens, D] of one sequence, copied out of its blocks."""
    _, _, num_kv_heads, block_tokens, head_dim = layer_blocks.shape
    used = table[: -(-num_tokens // block_tokens)].long()
    gathered = layer_blocks[used].permute(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)
    return gathered[KEY, :, :num_tokens], gathered[VALUE, :, :num_tokens]


def _causal_mask(num_queries: int, context: int, window: int | None, device: torch.device) -> Tensor:
    """bool [num_queries, context + num_queries]: True where a query attends."""
    query_positions = torch.arange(context, context + num_queries, device=device)[:, None]
    key_positions = torch.arange(context + num_queries, device=device)[None]
    visible = key_positions <= query_positions
    return visible if window is None else visible & (key_positions > query_positions - window)


def _plain_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, options: AttentionOptions) -> Tensor:
    """Attention written out, in float32: queries [Hq, L, D], keys and values [Hkv, S, D] -> [Hq, L, D]."""
    group = queries.shape[0] // keys.shape[0]
    scores = queries.float() @ keys.float().repeat_interleave(group, 0).transpose(1, 2) * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if options.sinks is not None:
        sink_scores = options.sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, sink_scores], dim=-1)
    weights = scores.softmax(-1)[..., : keys.shape[1]]
    return (weights @ values.float().repeat_interleave(group, 0)).to(queries.dtype)
