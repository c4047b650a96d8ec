"""How fast attention is on the device, beside the rates of memory and of products there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from batchpipe.attention.base import AttentionInputs, AttentionOptions
from batchpipe.attention.device_inputs import DeviceStepInputs
from batchpipe.kv.pool import KvPool
from benchmarks.gpu.case import SHAPES, Case
from benchmarks.gpu.machine import ceilings

# Sequences, new tokens of each, tokens before them.
_DECODES = {"decode, 128 x 1k": (128, 1, 1024), "decode, 256 x 4k": (256, 1, 4096)}
_PROMPTS = {"prompts, 8 x 1k": (8, 1024, 0), "prompts, 1 x 8k": (1, 8192, 0)}
_BLOCK_TOKENS = 16
_LAYERS = 2  # of the pool; one is read


def kernels(case: Case) -> None:
    """Attention of one layer of the case's shape; the part of the rates is against a copy, or a product."""
    limits = ceilings(case)
    case.say("ceilings", ceilings=limits)
    if case.device != "cuda":  # the kernels are those of a GPU
        return
    for what, shape in (_DECODES | _PROMPTS).items():
        case.attempt(what, lambda shape=shape: _attention(case, limits, *shape))  # type: ignore[misc]


def _attention(
    case: Case, limits: dict[str, float], num_sequences: int, num_new: int, num_context: int
) -> dict[str, Any]:
    from batchpipe.attention.triton_attention import TILE_QUERIES, TritonAttention

    shape = SHAPES[case.shape]
    num_heads, num_kv_heads, head_dim = (
        shape[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    width = -(-(num_new + num_context) // _BLOCK_TOKENS)
    pool = KvPool(
        num_sequences * width, _LAYERS, num_kv_heads, _BLOCK_TOKENS, head_dim, torch.bfloat16, case.torch_device
    )
    pool.data.normal_()
    tables = np.random.default_rng(0).permutation(pool.num_blocks).astype(np.int32).reshape(num_sequences, width)
    num_tokens = num_sequences * num_new
    step_inputs = DeviceStepInputs(
        pool.device,
        _BLOCK_TOKENS,
        max_tokens=num_tokens,
        max_sequences=num_sequences,
        tile_queries=TILE_QUERIES,
    )
    new, context = (np.full(num_sequences, number, np.int32) for number in (num_new, num_context))
    at = step_inputs.fill(np.zeros(num_tokens, np.int32), new, context, tables, np.ones(num_sequences, np.bool_))
    backend = TritonAttention()
    inputs = AttentionInputs.of_device(at, pool, backend, 0)
    query = torch.randn(num_tokens, num_heads, head_dim, device=pool.device, dtype=torch.bfloat16)
    options = AttentionOptions(head_dim**-0.5)
    seconds = case.queued_seconds(lambda: backend.attend(inputs, 1, query, options))
    pairs = num_sequences * num_new * (num_context + (num_new + 1) / 2)
    flops = 4 * pairs * num_heads * head_dim
    num_bytes = 2 * num_sequences * (num_context + num_new) * num_kv_heads * head_dim * 2
    return {
        "kernel_seconds": seconds,
        "of_copy_rate": num_bytes / seconds / limits["copy_bytes_per_second"],
        "of_product_rate": flops / seconds / limits["bf16_flops_per_second"],
    }
