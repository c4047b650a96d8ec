"""Whether the device computes what it must: attention against the reference, whole jobs against transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from batchpipe.attention.choose import choose_backend
from batchpipe.attention.reference import ReferenceAttention
from batchpipe.model.tokenizer import load_tokenizer
from benchmarks.gpu.case import Case
from benchmarks.gpu.jobs import run_here
from tests.attention.paged_cases import PagedCase, attend_in_chunks
from tests.tiny_models import ARCHITECTURES, save_tiny_model

# Largest error, relative to the norm of the output.
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_LENGTHS = [19, 1, 7, 37]
_CHUNK_TOKENS = 6
_MODELS = ("llama", "gemma2", "gpt_oss", "qwen3_moe", "qwen2", "gemma3", "glm4_moe", "phi3", "olmo", "smollm3")
_NUM_PROMPTS, _NEW_TOKENS = 10, 24


def attention(case: Case) -> None:
    """The device's backend over sequences in scattered blocks: windows, softcaps, sinks, groups, sizes, dtypes."""
    options: list[dict[str, Any]] = [
        {},
        {"sliding_window": 5},
        {"softcap": 3.0},
        {"sinks": True},
        {"sinks": True, "softcap": 2.0, "sliding_window": 7},
    ]
    shapes = [(1, 2, 16, torch.float32), (16, 4, 64, torch.float32)]
    if not case.tiny:
        shapes += [(16, 4, 128, torch.bfloat16), (16, 7, 80, torch.bfloat16), (16, 8, 64, torch.float16)]
    for block_tokens, group, head_dim, dtype in shapes:
        for chosen in options:
            what = f"attention, {dtype}, blocks of {block_tokens}, group of {group}, heads of {head_dim}, {chosen}"
            sequences = PagedCase.make(
                lengths=_LENGTHS, group=group, block_tokens=block_tokens, head_dim=head_dim, dtype=dtype, **chosen
            )
            case.attempt(what, lambda sequences=sequences: _attention_error(case, sequences))  # type: ignore[misc]


def _attention_error(case: Case, sequences: PagedCase) -> dict[str, Any]:
    """Against the reference in float32 on the CPU."""
    exact = replace(
        sequences,
        queries=sequences.queries.float(),
        keys=sequences.keys.float(),
        values=sequences.values.float(),
        sinks=None if sequences.sinks is None else sequences.sinks.float(),
    )
    device, dtype = case.torch_device, sequences.queries.dtype
    moved = replace(
        sequences,
        queries=sequences.queries.to(device),
        keys=sequences.keys.to(device),
        values=sequences.values.to(device),
        sinks=None if sequences.sinks is None else sequences.sinks.to(device),
    )
    backend = choose_backend("auto", device, dtype, sequences.queries.shape[-1])
    found = attend_in_chunks(backend, moved, _CHUNK_TOKENS)
    wanted = attend_in_chunks(ReferenceAttention(), exact, _CHUNK_TOKENS)
    errors = [
        float((one.cpu().float() - other).norm() / other.norm()) for one, other in zip(found, wanted, strict=True)
    ]
    return {"backend": backend.name, "relative_error": max(errors), "wrong": max(errors) > _TOLERANCES[dtype]}


def sameness(case: Case) -> None:
    """Greedy float32 jobs of tiny models: the texts of `transformers.generate` on the CPU, however KV is kept."""
    short = {"kv_device_memory": "160KiB", "block_tokens": 16, "max_batch_sequences": 8, "max_step_tokens": 64}
    two_tiers = {**short, "kv_host_memory": "4MiB", "kv_verify": "all"}
    settings: dict[str, dict[str, Any]] = {
        "all KV on the device": {"block_tokens": 16, "max_step_tokens": 64},
        "short of KV": short,
        "swapped by layer": {**two_tiers, "offload": "layer"},
        "swapped by batch": {**two_tiers, "offload": "batch"},
    }
    if case.holds_two_stages:
        settings["two stages"] = {"num_stages": 2, "block_tokens": 4, "max_step_tokens": 64}
        settings["two stages, prefetched by batch"] = {**two_tiers, "num_stages": 2, "offload": "batch"}
    for name in _MODELS[: 1 if case.tiny else None]:
        folder = save_tiny_model(ARCHITECTURES[name](), case.work / f"model-{name}")
        rows = case.rows(_NUM_PROMPTS, 90)
        expected = _texts_of_transformers(folder, rows)
        for setting, engine in settings.items():
            case.attempt(f"{name}, {setting}", lambda f=folder, e=engine, x=expected: _same(case, f, e, x))  # type: ignore[misc]


def _same(case: Case, folder: Path, engine: dict[str, Any], expected: list[str]) -> dict[str, Any]:
    sampling = {"max_tokens": _NEW_TOKENS, "ignore_eos": True}
    rows = case.rows(_NUM_PROMPTS, 90)
    texts, metrics = run_here(case, folder, rows, sampling, engine | {"device": case.device}, dtype="float32")
    num_equal = sum(text == other for text, other in zip(texts, expected, strict=True))
    figures = ("preemptions", "host_to_device_bytes", "kv_faults", "num_stages")
    wrong = num_equal < len(expected) or metrics["kv_faults"] > 0
    return {"equal": num_equal, "rows": len(expected), **{key: metrics[key] for key in figures}, "wrong": wrong}


def _texts_of_transformers(folder: Path, rows: Path) -> list[str]:
    tokenizer = load_tokenizer(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    prompts = [json.loads(line)["prompt"] for line in rows.read_text().splitlines()]
    texts = []
    for prompt in tokenizer.encode_batch(prompts, add_special_tokens=True):
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=_NEW_TOKENS)
        texts.append(tokenizer.decode(output[0, len(prompt) :].tolist()))
    return texts
