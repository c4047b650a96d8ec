"""A whole job beside the least time that its work takes on the device, and beside transformers' own batching."""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import transformers

from batchpipe.model.describe import describe_model
from batchpipe.model.tokenizer import load_tokenizer
from benchmarks.gpu.case import Case
from benchmarks.gpu.jobs import run_here
from benchmarks.gpu.machine import ceilings

# Lengths of first exchanges in ShareGPT, in tokens, at every twentieth part of 7,250 of them.
_PROMPT_TOKENS = (4, 7, 8, 10, 12, 13, 15, 17, 19, 22, 26, 31, 37, 45, 58, 74, 99, 138, 215, 394, 1024)
_ANSWER_TOKENS = (
    4, 27, 51, 81, 105, 133, 164, 192, 219, 244, 266, 289, 315, 341, 370, 405, 450, 511, 599, 746, 1742,
)  # fmt: skip
_NUM_ROWS = 2000
_PEER_ROWS, _PEER_PROMPT, _PEER_TOKENS = 512, 200, 128
_FIGURES = (
    "rows_succeeded", "prompt_tokens", "completion_tokens", "output_tokens_per_second", "load_seconds",
    "generate_seconds", "stage_utilization", "planner_seconds", "preemptions", "batch_sequences",
)  # fmt: skip


def throughput(case: Case) -> None:
    """Rows with the lengths of ShareGPT, and a smaller set that transformers' `generate_batch` runs too."""
    folder = case.saved_model()
    num_rows = 20 if case.tiny else _NUM_ROWS
    rows = _sharegpt_rows(case, num_rows)
    case.attempt("job of ShareGPT's lengths", lambda: _job(case, folder, rows))
    if case.device == "cuda":
        case.attempt("beside transformers' generate_batch", lambda: _beside_transformers(case, folder))


def _sharegpt_rows(case: Case, number: int) -> Path:
    random = np.random.default_rng(3)
    parts = np.linspace(0, 1, len(_PROMPT_TOKENS))
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    path = case.work / f"sharegpt-{number}.jsonl"
    with path.open("w") as file:
        for index in range(number):
            prompt, answer = (
                int(np.interp(random.random(), parts, lengths)) for lengths in (_PROMPT_TOKENS, _ANSWER_TOKENS)
            )
            text = "".join(random.choice(letters, prompt))
            file.write(json.dumps({"id": str(index), "prompt": text, "own": {"max_tokens": answer}}) + "\n")
    return path


def _job(case: Case, folder: Path, rows: Path) -> dict[str, Any]:
    sampling = {"column": "own", "ignore_eos": True}
    _, metrics = run_here(case, folder, rows, sampling, {"device": case.device})
    floor = _floor_seconds(case, folder, metrics, rows)
    return {key: metrics[key] for key in _FIGURES if key in metrics} | {
        "floor_seconds": floor,
        "of_floor": floor / metrics["generate_seconds"],
    }


def _floor_seconds(case: Case, folder: Path, metrics: Any, rows: Path) -> float:
    """What products at the measured rate, and weights and KV at the rate of a copy, take at least.

    Every step is taken to hold the most sequences, so its weights are read as seldom as can be.
    """
    info, limits = describe_model(folder, "bfloat16"), ceilings(case)
    layer_bytes, head_bytes = sum(info.layer_weight_bytes), 2 * info.vocabulary_size * info.hidden_size
    tokenizer = load_tokenizer(folder)
    context_tokens = 0
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        [prompt_ids] = tokenizer.encode_batch([row["prompt"]], add_special_tokens=True)
        prompt, answer = len(prompt_ids), row["own"]["max_tokens"]
        context_tokens += answer * prompt + answer * (answer - 1) // 2
    num_drawn = metrics["completion_tokens"]
    flops_rate, copy_rate = limits["bf16_flops_per_second"], limits["copy_bytes_per_second"]
    # Two operations and two bytes a weight.
    prefill = metrics["prompt_tokens"] * layer_bytes / flops_rate
    num_steps = num_drawn / 512
    weights = max(
        num_drawn * (layer_bytes + head_bytes) / flops_rate, num_steps * (layer_bytes + head_bytes) / copy_rate
    )
    return float(prefill + weights + context_tokens * info.kv_bytes_per_token_layer * info.num_layers / copy_rate)


def _beside_transformers(case: Case, folder: Path) -> dict[str, Any]:
    path = case.work / "peer.jsonl"
    random = np.random.default_rng(4)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    prompts = ["".join(random.choice(letters, int(random.integers(50, _PEER_PROMPT)))) for _ in range(_PEER_ROWS)]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    sampling = {"max_tokens": _PEER_TOKENS, "ignore_eos": True}
    _, metrics = run_here(case, folder, path, sampling, {"device": case.device})
    ours = metrics["output_tokens_per_second"]
    torch.cuda.empty_cache()
    tokenizer = load_tokenizer(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="paged|sdpa"
    )
    model = model.to(case.torch_device).eval()
    settings = transformers.GenerationConfig(
        max_new_tokens=_PEER_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=2
    )
    inputs = [list(ids) for ids in tokenizer.encode_batch(prompts, add_special_tokens=True)]
    started = perf_counter()
    outputs = model.generate_batch(inputs=inputs, generation_config=settings)
    seconds = perf_counter() - started
    made = sum(len(one.generated_tokens) for one in outputs.values())
    return {
        "output_tokens_per_second": ours,
        "peer": made / seconds,
        "ratio": ours * seconds / made,
        "rows": len(outputs),
    }
