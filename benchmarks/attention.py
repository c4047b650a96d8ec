"""How fast the CPU attention kernels read KV, beside the machine's sequential read rate measured in turns with them.

    python benchmarks/attention.py --sequences 256 --context 256 --kv-heads 3 --group 3 --head-dim 64

Decodes: every sequence adds one token. Prefill: every sequence brings `--prompt` tokens. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
import torch

from batchpipe.attention.base import AttentionOptions
from batchpipe.attention.choose import choose_backend
from batchpipe.attention.step_inputs import StepInputs
from batchpipe.kv.pool import KvPool

READ_BYTES = 1 << 30


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def attention_call(arguments: argparse.Namespace, query_tokens: int, context: int) -> Callable[[int], object]:
    """A function of the layer number that runs one step over scattered blocks."""
    dtype = getattr(torch, arguments.dtype)
    backend = choose_backend(arguments.backend, torch.device("cpu"), dtype, arguments.head_dim)
    block_tokens = arguments.block_tokens or backend.default_block_tokens
    width = -(-(context + query_tokens) // block_tokens)
    pool = KvPool(
        arguments.sequences * width,
        arguments.layers,
        arguments.kv_heads,
        block_tokens,
        arguments.head_dim,
        dtype,
    )
    for block in pool.data:
        block.normal_()
    inputs = StepInputs(pool).fill(
        np.full(arguments.sequences, query_tokens, np.int32),
        np.full(arguments.sequences, context, np.int32),
        np.random.default_rng(0).permutation(pool.num_blocks).astype(np.int32).reshape(-1, width),
        backend=backend,
    )
    num_tokens = arguments.sequences * query_tokens
    query = torch.randn(num_tokens, arguments.kv_heads * arguments.group, arguments.head_dim).to(dtype)
    key, value = torch.randn(2, num_tokens, arguments.kv_heads, arguments.head_dim).to(dtype)
    options = AttentionOptions(arguments.head_dim**-0.5)
    return lambda layer: backend.forward(inputs, layer, query, key, value, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {
        "sequences": 256,
        "context": 256,
        "prompt": 90,
        "kv-heads": 3,
        "group": 3,
        "head-dim": 64,
        "block-tokens": 0,
        "layers": 10,
        "rounds": 15,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--backend", default="auto")
    arguments = parser.parse_args()

    memory = torch.ones(READ_BYTES // 4)
    decode = attention_call(arguments, 1, arguments.context - 1)
    prefill = attention_call(arguments, arguments.prompt, 0)
    decode_seconds, prefill_seconds, read_seconds = [], [], []
    for _ in range(arguments.rounds):
        read_seconds.append(seconds(memory.sum))
        decode_seconds += [seconds(partial(decode, layer)) for layer in range(arguments.layers)]
        prefill_seconds.append(seconds(lambda: prefill(0)))
    kv_bytes = 2 * arguments.sequences * arguments.context * arguments.kv_heads * arguments.head_dim
    kv_bytes *= getattr(torch, arguments.dtype).itemsize
    read_rate = READ_BYTES / median(read_seconds)
    decode_rate = kv_bytes / median(decode_seconds)
    result = vars(arguments) | {
        "threads": torch.get_num_threads(),
        "read_gigabytes_per_second": round(read_rate / 1e9, 1),
        "decode_gigabytes_per_second": round(decode_rate / 1e9, 1),
        "decode_to_read": round(decode_rate / read_rate, 2),
        "decode_layer_milliseconds": round(median(decode_seconds) * 1e3, 3),
        "prefill_layer_milliseconds": round(median(prefill_seconds) * 1e3, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
