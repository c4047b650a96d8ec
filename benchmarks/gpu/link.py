"""What the link between host memory and the device carries, copied as the two tiers of KV copy."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np
import torch

from batchpipe.kv.pool import KvPool
from batchpipe.pipeline.swap.block_copies import copy_pieces
from benchmarks.gpu.case import SHAPES, Case

_BLOCK_TOKENS = 16
_NUM_MOVED = 128


def link(case: Case) -> None:
    """Pinning host memory, and copies of scattered blocks: whole, and one layer of each."""
    for name in ["tiny"] if case.tiny else ["llama-3.2-1b", "llama-3.1-8b"]:
        case.attempt(f"link, KV of {name}", lambda name=name: _rates(case, SHAPES[name]))  # type: ignore[misc]


def _rates(case: Case, shape: dict[str, Any]) -> dict[str, Any]:
    geometry = (
        shape["num_hidden_layers"], shape["num_key_value_heads"], _BLOCK_TOKENS, shape["head_dim"], torch.bfloat16,
    )  # fmt: skip
    pool = KvPool(2 * _NUM_MOVED, *geometry, case.torch_device)
    started = perf_counter()
    host = KvPool(4 * _NUM_MOVED, *geometry, pinned=case.device == "cuda")
    pinning_seconds = perf_counter() - started
    random = np.random.default_rng(0)
    sources = random.permutation(host.num_blocks)[:_NUM_MOVED].astype(np.int32)
    targets = random.permutation(pool.num_blocks)[:_NUM_MOVED].astype(np.int32)
    host_layers, device_layers = (one.data.flatten(2).view(torch.uint8) for one in (host, pool))
    copies = {
        "whole blocks to the device": (device_layers.flatten(1), targets, host_layers.flatten(1), sources),
        "one layer of blocks to the device": (device_layers[:, 1], targets, host_layers[:, 1], sources),
        "whole blocks to the host": (host_layers.flatten(1), sources, device_layers.flatten(1), targets),
    }
    figures: dict[str, Any] = {"block_bytes": pool.bytes_per_block, "pinned_bytes": host.data.nbytes}
    for name, (target, to, source, of) in copies.items():
        seconds = case.median_seconds(lambda t=target, i=to, s=source, j=of: copy_pieces(t, i, s, j))  # type: ignore[misc]
        num_bytes = _NUM_MOVED * target[0].nbytes
        figures[name] = {"bytes_per_second": num_bytes / seconds, "piece_bytes": target[0].nbytes}
    if case.device == "cuda":
        host.unpin()
    return figures | {"pinning_seconds": pinning_seconds}
