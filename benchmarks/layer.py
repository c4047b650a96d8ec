"""One decode step through all layers of a model on the CPU: as transformers has it, fused, and the products alone.

    python benchmarks/layer.py FOLDER --rows 256 --context 200

The three take turns in one run; the head is left out. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear

from batchpipe.attention.base import AttentionInputs
from batchpipe.attention.choose import choose_backend
from batchpipe.attention.step_inputs import StepInputs
from batchpipe.kv.pool import KvPool
from batchpipe.model.describe import describe_model
from batchpipe.model.fused.cpu_modules import PackedLinear
from batchpipe.model.fused.fuse import fuse
from batchpipe.model.load import StageModel, load_stage


def inputs_of_a_decode(folder: Path, rows: int, context: int) -> AttentionInputs:
    info = describe_model(folder, "bfloat16")
    backend = choose_backend("auto", torch.device("cpu"), torch.bfloat16, info.head_dim)
    width = -(-(context + 1) // backend.default_block_tokens)
    pool = KvPool(
        rows * width,
        info.num_layers,
        info.num_kv_heads,
        backend.default_block_tokens,
        info.head_dim,
        torch.bfloat16,
    )
    for block in pool.data:
        block.normal_()
    tables = np.random.default_rng(0).permutation(pool.num_blocks).astype(np.int32).reshape(rows, width)
    ones = np.ones(rows, np.int32)
    return StepInputs(pool).fill(ones, ones * context, tables, backend=backend)


def whole_model(stage: StageModel, inputs: AttentionInputs) -> Callable[[], object]:
    token_ids = torch.arange(inputs.num_tokens)
    return lambda: stage.model.base_model(
        input_ids=token_ids[None],
        position_ids=inputs.positions[None],
        use_cache=False,
        attention_inputs=inputs,
    )


def products_alone(stage: StageModel, rows: int, *, packed: bool) -> Callable[[], None]:
    """Every linear layer but the head, on an input of its own."""
    layers = [module for module in stage.model.base_model.modules() if type(module) is nn.Linear]
    sizes = {layer.in_features: torch.randn(1, rows, layer.in_features).bfloat16() for layer in layers}
    calls: list[Callable[[torch.Tensor], object]] = [
        PackedLinear([layer]) if packed else partial(linear, weight=layer.weight) for layer in layers
    ]
    pairs = [(call, sizes[layer.in_features]) for call, layer in zip(calls, layers, strict=True)]

    def run() -> None:
        for call, hidden in pairs:
            call(hidden)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()

    info = describe_model(arguments.folder, "bfloat16")
    layers = range(info.num_layers)
    plain = load_stage(arguments.folder, layers, is_first=True, is_last=True, dtype=torch.bfloat16)
    fused = copy.deepcopy(plain)
    num_fused = len(fuse(fused, torch.bfloat16))
    inputs = inputs_of_a_decode(arguments.folder, arguments.rows, arguments.context)
    calls = {
        "transformers": whole_model(plain, inputs),
        "fused": whole_model(fused, inputs),
        "products": products_alone(plain, arguments.rows, packed=False),
        "packed_products": products_alone(plain, arguments.rows, packed=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for _ in range(arguments.rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
    result = {
        "model": arguments.folder.name,
        "rows": arguments.rows,
        "context": arguments.context,
        "modules_fused": num_fused,
        **{f"{name}_milliseconds": round(median(times) * 1e3, 1) for name, times in seconds.items()},
        **{f"{name}_best_milliseconds": round(min(times) * 1e3, 1) for name, times in seconds.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
