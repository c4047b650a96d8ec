"""Two measured GPU runs of vLLM rebuilt on the virtual clock from their kernels' tables. The last line is JSON.

    python benchmarks/gpu_runs.py DATA_FOLDER

The tables, requests and truths are those of github.com/casys-kaist/LLMServingSim: Llama-3.1-8B in bfloat16 on one
RTX 4090 and one RTX PRO 6000, vLLM 0.19, 300 requests that arrive ten a second. The peer's policy is `hybrid` with
its own limits (2,048 tokens a step, blocks of 16, the run's own number of sequences and of KV tokens). Nothing is
fitted: a step takes what the tables say its kernels take.
"""

from __future__ import annotations

import argparse
import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchpipe.cost.model import KvLink, StepWork
from batchpipe.pipeline.simulated import SimulatedPipeline
from batchpipe.runner.simulate import simulate
from batchpipe.types import Capacity
from benchmarks.replay_cases import EOS_TOKEN_ID, Lengths, columns_of, lines_of, requests_of

NUM_LAYERS = 32
KV_BYTES_PER_TOKEN = 32 * 2 * 8 * 128 * 2
WEIGHT_BYTES = 16.06e9
BLOCK_TOKENS = 16
# How often a layer's kernels run in one layer, and those outside the layers in one step.
LAYER_KERNELS = {
    "layernorm": 2, "qkv_proj": 1, "rotary_emb": 1, "o_proj": 1, "gate_up_proj": 1, "act_fn": 1, "down_proj": 1,
}  # fmt: skip
STEP_KERNELS = ("embedding", "final_layernorm")
HEAD_KERNELS = ("lm_head", "sampler")
RUNS = ("llmservingsim_rtx4090_llama31_8b", "llmservingsim_rtxpro6000_llama31_8b")


class Grid:
    """Seconds over the product of a few axes, linear in between; beyond an axis's end the last value holds."""

    def __init__(self, axes: list[list[int]], seconds: NDArray[np.float64]) -> None:
        self._axes = axes
        self._seconds = seconds

    def at(self, *places: float) -> float:
        corners = []
        for axis, place in zip(self._axes, places, strict=True):
            right = min(max(bisect_right(axis, place), 1), len(axis) - 1)
            share = (place - axis[right - 1]) / (axis[right] - axis[right - 1])
            share = min(max(share, 0.0), 1.0)
            corners.append(((right - 1, 1 - share), (right, share)))
        total = 0.0
        for choice in product(*corners):
            weight = 1.0
            for _, share in choice:
                weight *= share
            if weight:
                total += weight * float(self._seconds[tuple(index for index, _ in choice)])
        return total


def read_kernels(path: Path, counted: str, kernels: dict[str, int]) -> Grid:
    """The kernels' seconds together, each as often as it runs, over tokens or sequences."""
    columns = columns_of(path)
    sizes = sorted({int(size) for size in columns[counted]})
    seconds = np.zeros(len(sizes))
    for layer, size, microseconds in zip(columns["layer"], columns[counted], columns["time_us"], strict=True):
        seconds[sizes.index(int(size))] += kernels.get(layer, 0) * float(microseconds) * 1e-6
    return Grid([sizes], seconds)


def read_attention(path: Path) -> Grid:
    """Seconds of one layer over prefill tokens, their context, decodes, and KV tokens of each decode.

    One file holds a second, sparser grid beside that of powers of two, which alone is whole. No prefill or no decode
    has no context, so those faces are filled from what was measured; so are the most decodes beside prefills.
    """
    names = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
    columns = columns_of(path)
    points = np.array([columns[name] for name in names], dtype=np.int64)
    whole = ((points & (points - 1)) == 0).all(axis=0)
    points = points[:, whole]
    axes = [np.unique(values) for values in points]
    seconds = np.full([len(axis) for axis in axes], np.nan)
    index = tuple(np.searchsorted(axis, values) for axis, values in zip(axes, points, strict=True))
    seconds[index] = np.array(columns["time_us"], dtype=np.float64)[whole] * 1e-6
    seconds[0, 0, 0, :] = 0.0
    seconds[0, 1:] = seconds[0, :1]
    seconds[:, :, 0, 1:] = seconds[:, :, 0, :1]
    seconds[:, :, 1:, 0] = seconds[:, :, 1:, 1]
    seconds[1:, :, -1] = seconds[1:, :, -2] + (seconds[:1, :, -1] - seconds[:1, :, -2])
    assert not np.isnan(seconds).any(), f"{path}: {np.isnan(seconds).sum()} places of the grid were not measured"
    return Grid([axis.tolist() for axis in axes], seconds)


class TableCost:
    """One device; a step's prompts are looked up as one whose (token, KV token) pairs are as many."""

    num_stages = 1
    distinct_stages = (0,)
    control_seconds = 0.0
    kv_links: Sequence[KvLink] = ()  # all KV is on the device

    def __init__(self, folder: Path) -> None:
        self._layer = read_kernels(folder / "dense.csv", "tokens", LAYER_KERNELS)
        self._step = read_kernels(folder / "dense.csv", "tokens", dict.fromkeys(STEP_KERNELS, 1))
        self._head = read_kernels(folder / "per_sequence.csv", "sequences", dict.fromkeys(HEAD_KERNELS, 1))
        self._attention = read_attention(folder / "attention.csv.xz")

    def stage_seconds(self, stage: int, work: StepWork) -> float:
        layer = self._layer.at(work.num_tokens) + self._attention_seconds(work)
        return NUM_LAYERS * layer + self._step.at(work.num_tokens) + self._head.at(max(1, work.num_drawn))

    def handoff_seconds(self, num_tokens: int) -> float:
        return 0.0

    def _attention_seconds(self, work: StepWork) -> float:
        decodes = work.num_decodes
        each_tokens = work.decode_context_tokens / max(1, decodes)
        alone = self._attention.at(0, 0, decodes, each_tokens)
        tokens = work.num_tokens - decodes
        if tokens == 0:
            return alone
        own_pairs = tokens * (tokens + 1) / 2
        context = max(0.0, (work.prefill_pairs - own_pairs) / tokens)
        # Several short prompts have fewer pairs than one of their tokens together.
        share = min(1.0, work.prefill_pairs / own_pairs)
        return alone + share * (self._attention.at(tokens, context, decodes, each_tokens) - alone)


def kv_tokens_of(meta: dict[str, Any], config: dict[str, Any]) -> int:
    """As the run reports it, else the device's memory in use less the weights."""
    if "kv_cache" in meta:
        return int(meta["kv_cache"]["num_kv_tokens"])
    memory = config["nodes"][0]["instances"][0]["npu_mem"]
    return int((memory["mem_size"] * 1e9 * memory["mem_util"] - WEIGHT_BYTES) / KV_BYTES_PER_TOKEN)


def rebuild(folder: Path) -> dict[str, float]:
    meta, config = (json.loads((folder / name).read_text()) for name in ("meta.json", "run_config.json"))
    rows = [json.loads(line) for line in lines_of(folder / "requests.jsonl")]
    rows.sort(key=lambda row: row["arrival_time"])
    first = rows[0]["arrival_time"]
    prompt, output = (np.array([row[key] for row in rows], np.int32) for key in ("input_toks", "output_toks"))
    requests, by_stream = requests_of(Lengths(prompt, output, int((prompt + output).max())))
    limits = meta["engine_kwargs"]
    capacity = Capacity(
        num_blocks=kv_tokens_of(meta, config) // BLOCK_TOKENS,
        block_tokens=BLOCK_TOKENS,
        num_stages=1,
        max_batches=1,
        max_step_tokens=limits["max_num_batched_tokens"],
        max_batch_sequences=limits["max_num_seqs"],
    )
    pipeline = SimulatedPipeline(capacity, TableCost(folder), by_stream, EOS_TOKEN_ID)
    arrivals = [row["arrival_time"] - first for row in rows]
    run = simulate([pipeline], requests, "hybrid", arrival_seconds=arrivals)
    measured_seconds = max(row["last_token_ts"] for row in rows) - min(row["queued_ts"] for row in rows)
    assert run.output_tokens == output.sum()
    return {
        "measured_seconds": measured_seconds,
        "simulated_seconds": run.seconds,
        "ratio": run.seconds / measured_seconds,
        "output_tokens_per_second": run.output_tokens_per_second,
        "num_steps": run.num_steps,
        "num_preemptions": run.num_preemptions,
        "num_recomputed_tokens": run.num_recomputed_tokens,
        "planner_seconds": run.planner_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with profiles/")
    args = parser.parse_args()
    print(json.dumps({name: rebuild(args.data / "profiles" / name) for name in RUNS}))


if __name__ == "__main__":
    main()
