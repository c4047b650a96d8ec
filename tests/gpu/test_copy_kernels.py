"""Copies of KV between the tiers by the GPU's kernels against plain indexing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.gpu.interpreter import DEVICE  # isort: skip
from batchpipe.kv.pool import KvPool
from batchpipe.pipeline.swap.triton_copies import copy_pieces_on_gpu, copy_tokens, on_gpu

RANDOM = np.random.default_rng(0)


def random_pool(num_blocks: int) -> KvPool:
    pool = KvPool(num_blocks, 3, 2, 16, 24, torch.float16, DEVICE)
    pool.data.copy_(torch.from_numpy(RANDOM.normal(size=pool.data.shape)).half())
    return pool


def test_tokens_go_to_their_rows_and_come_back() -> None:
    pool = random_pool(9)
    tokens = torch.from_numpy(RANDOM.normal(size=(5, 3, 2, 2, 24))).half().to(DEVICE)
    blocks, rows = RANDOM.permutation(9)[:5].astype(np.int32), RANDOM.integers(0, 16, 5).astype(np.int32)
    expected = pool.data.clone()
    expected[torch.from_numpy(blocks).long(), :, :, :, torch.from_numpy(rows).long()] = tokens
    places = on_gpu(blocks, DEVICE), on_gpu(rows, DEVICE)
    copy_tokens(tokens, pool, *places, to_pool=True)
    assert torch.equal(pool.data, expected)
    back = torch.zeros_like(tokens)
    copy_tokens(back, pool, *places, to_pool=False)
    assert torch.equal(back, tokens)


@pytest.mark.parametrize("layer", [None, 1])
def test_pieces_go_to_their_places(layer: int | None) -> None:
    pool, other = random_pool(9), random_pool(20)
    to, of = RANDOM.permutation(9)[:4].astype(np.int32), RANDOM.permutation(20)[:4].astype(np.int32)
    expected = pool.data.clone()
    parts = (slice(None),) if layer is None else (layer,)
    for target, source in zip(to.tolist(), of.tolist(), strict=True):
        expected[(target, *parts)] = other.data[(source, *parts)]
    targets, sources = (one.data.flatten(2).view(torch.uint8) for one in (pool, other))
    pieces = (targets.flatten(1), sources.flatten(1)) if layer is None else (targets[:, layer], sources[:, layer])
    copy_pieces_on_gpu(pieces[0], to, pieces[1], of)
    assert torch.equal(pool.data, expected)
