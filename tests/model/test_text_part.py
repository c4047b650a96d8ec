"""The language models inside multimodal ones, against the whole models of transformers that are given text alone."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

from batchpipe.errors import ModelError
from batchpipe.model.describe import describe_model
from batchpipe.model.text_part import text_settings
from tests.model.test_load_stage import NEW_TOKENS, PROMPTS, Pipeline

_TEXT: dict[str, Any] = {
    "vocab_size": 336,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "sliding_window": None,
    "eos_token_id": 2,
    "bos_token_id": None,
    "pad_token_id": None,
}
_ROTATION = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 2, 2]}
_VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_QWEN_VISION: dict[str, Any] = {"depth": 1, "num_heads": 2, "hidden_size": 32, "out_hidden_size": 48}
MULTIMODAL: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        t.Gemma3ForConditionalGeneration, t.Gemma3Config,
        _TEXT | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}, _VISION,
    ),
    "mistral3": (t.Mistral3ForConditionalGeneration, t.Mistral3Config, _TEXT | {"model_type": "mistral"}, _VISION),
    "llava": (t.LlavaForConditionalGeneration, t.LlavaConfig, _TEXT | {"model_type": "llama"}, _VISION),
    "qwen2_vl": (
        t.Qwen2VLForConditionalGeneration, t.Qwen2VLConfig, _TEXT | {"rope_parameters": _ROTATION},
        {"depth": 1, "num_heads": 2, "embed_dim": 32, "hidden_size": 48},
    ),
    "qwen2_5_vl": (
        t.Qwen2_5_VLForConditionalGeneration, t.Qwen2_5_VLConfig, _TEXT | {"rope_parameters": _ROTATION}, _QWEN_VISION,
    ),
    "qwen3_vl": (
        t.Qwen3VLForConditionalGeneration, t.Qwen3VLConfig, _TEXT | {"rope_parameters": _ROTATION},
        _QWEN_VISION | {"deepstack_visual_indexes": [0]},
    ),
    "qwen3_vl_moe": (
        t.Qwen3VLMoeForConditionalGeneration, t.Qwen3VLMoeConfig,
        _TEXT | {"rope_parameters": _ROTATION, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        _QWEN_VISION | {"deepstack_visual_indexes": [0]},
    ),
}  # fmt: skip
_folder = tempfile.TemporaryDirectory()


@functools.cache
def multimodal(kind: str) -> Path:
    model_class, config_class, text, vision = MULTIMODAL[kind]
    folder = Path(_folder.name, kind)
    torch.manual_seed(8)
    config = config_class(text_config=text, vision_config=vision, tie_word_embeddings=False)
    model_class(config).float().save_pretrained(folder)
    return folder


@functools.cache
def expected(kind: str) -> list[tuple[int, ...]]:
    model = MULTIMODAL[kind][0].from_pretrained(multimodal(kind), dtype=torch.float32)
    model.generation_config.eos_token_id = None
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS
        )
        texts.append(tuple(output[0, len(prompt) :].tolist()))
    return texts


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_text_is_continued_as_by_the_whole_model(kind: str) -> None:
    for num_stages, block_tokens, chunk_tokens in [(1, 16, 64), (2, 16, 5)]:
        found = Pipeline(multimodal(kind), num_stages, block_tokens).generate(chunk_tokens)
        assert found == expected(kind), num_stages


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model.", ""])
def test_names_of_older_and_newer_files(prefix: str, tmp_path: Path) -> None:
    """Before transformers 4.52 a wrapper's tensors had its language model's names behind its own; Qwen's had none."""
    source = multimodal("mistral3")
    for path in source.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        own = name.replace("model.language_model.", "model.").replace("language_model.model.", "model.")
        is_text = own.startswith(("model.layers", "model.embed_tokens", "model.norm", "lm_head"))
        own = own.removeprefix("language_model.")
        if is_text and prefix == "language_model.":
            own = prefix + own
        elif is_text and prefix:
            own = own.replace("model.", prefix, 1)
        tensors[own if is_text else name] = tensor
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert Pipeline(tmp_path, 2, 16).generate(64) == expected("mistral3")
    described = replace(describe_model(source, "float32"), folder=tmp_path, name=tmp_path.name)
    assert describe_model(tmp_path, "float32") == described


def test_sizes_are_those_of_the_language_model() -> None:
    info = describe_model(multimodal("gemma3"), "float32")
    tensors = load_file(multimodal("gemma3") / "model.safetensors")
    text = [tensor for name, tensor in tensors.items() if "vision" not in name and "projector" not in name]
    text_bytes = sum(4 * tensor.numel() for tensor in text)
    assert len(text) < len(tensors)
    assert sum(info.layer_weight_bytes) + info.other_weight_bytes == text_bytes


def test_settings_beside_those_of_the_other_parts() -> None:
    """As in the files of Qwen2-VL and Qwen2.5-VL."""
    old = {
        "model_type": "qwen2_5_vl", "hidden_size": 48, "vision_config": {"depth": 2}, "tie_word_embeddings": True,
        "eos_token_id": 7, "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]},
    }  # fmt: skip
    assert text_settings(old) == {
        "model_type": "qwen2", "hidden_size": 48, "tie_word_embeddings": True, "eos_token_id": 7, "rope_scaling": None,
        "architectures": [],
    }  # fmt: skip
    assert text_settings({"model_type": "llama", "vision_config": {}}) == {"model_type": "llama", "vision_config": {}}


def test_a_language_model_that_cannot_run_is_refused_by_name(tmp_path: Path) -> None:
    config = json.loads((multimodal("llava") / "config.json").read_text())
    config["text_config"] |= {"model_type": "mamba", "state_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="LlavaForConditionalGeneration .*'mamba'.* state-space layers"):
        describe_model(tmp_path, "float32", needs_weights=False)
