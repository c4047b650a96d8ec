"""Tiny random models of every supported architecture, in float32, with a tokenizer each.

The weights are large on purpose: logits lie far apart, so greedy tokens do not hang on the last bit.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.tiny_tokenizer import build_tiny_tokenizer

_VOCABULARY_SIZE = 336  # some more rows than the tokenizer has tokens, as usual
_FULL, _SLIDING = "full_attention", "sliding_attention"
_SHARED: dict[str, Any] = {
    "vocab_size": _VOCABULARY_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,  # a tied random model says its last token again and again
    "dtype": "float32",
}


def _config(config_class: type, **own: Any) -> Callable[[], Any]:
    return lambda: config_class(**{**_SHARED, **own})


def _of_type(model_type: str, **own: Any) -> Callable[[], Any]:
    return _config(CONFIG_MAPPING[model_type], **own)


_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "apertus": _config(t.ApertusConfig),
    "arcee": _config(t.ArceeConfig),
    "cohere": _config(t.CohereConfig, logit_scale=0.25),
    "cohere2": _config(t.Cohere2Config, sliding_window=8, head_dim=16, logit_scale=0.25),
    "ernie4_5": _config(t.Ernie4_5Config, head_dim=16),
    "exaone4": _config(t.Exaone4Config, sliding_window=8, sliding_window_pattern=4),
    "gemma": _config(t.GemmaConfig, head_dim=16),
    "gemma2": _config(
        t.Gemma2Config, sliding_window=8, head_dim=16, query_pre_attn_scalar=24, attn_logit_softcapping=5.0
    ),
    "gemma3": _config(
        t.Gemma3TextConfig,
        sliding_window=8,
        head_dim=16,
        query_pre_attn_scalar=24,
        layer_types=[_SLIDING, _SLIDING, _FULL, _SLIDING],
    ),
    "glm": _config(t.GlmConfig, head_dim=16),
    "glm4": _config(t.Glm4Config, head_dim=16),
    "glm4_moe": _config(
        t.Glm4MoeConfig, head_dim=16, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "gpt_oss": _config(
        t.GptOssConfig,
        sliding_window=8,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=[_SLIDING, _FULL] * 2,
    ),
    "granite": _config(
        t.GraniteConfig,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.5,
        logits_scaling=2.0,
    ),
    "granitemoe": _config(
        t.GraniteMoeConfig,
        num_local_experts=4,
        num_experts_per_tok=2,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
    ),
    "granitemoehybrid": _config(  # of attention layers alone, as granite-4.0-micro is
        t.GraniteMoeHybridConfig,
        layer_types=["attention"] * 4,
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=64,
        position_embedding_type="rope",
        mamba_n_heads=8,
        mamba_d_head=12,
        mamba_d_state=8,
    ),
    "hunyuan": _config(t.HunYuanDenseV1Config, head_dim=16),
    "llama": _config(t.LlamaConfig),
    "llama_rope_scaled": _config(
        t.LlamaConfig,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "llama_tied": _config(t.LlamaConfig, tie_word_embeddings=True),
    "ministral3": _config(t.Ministral3Config, head_dim=16),
    "mistral": _config(t.MistralConfig, sliding_window=8),
    "mixtral": _config(t.MixtralConfig, num_local_experts=4, num_experts_per_tok=2),
    "olmo": _config(t.OlmoConfig),
    "olmo2": _config(t.Olmo2Config),
    "olmo3": _config(t.Olmo3Config, sliding_window=8, layer_types=[_SLIDING, _SLIDING, _SLIDING, _FULL]),
    "olmoe": _config(t.OlmoeConfig, num_experts=4, num_experts_per_tok=2),
    "phi3": _config(t.Phi3Config, sliding_window=None),
    "phimoe": _config(t.PhimoeConfig, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    "qwen2": _config(t.Qwen2Config, use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "qwen2_moe": _config(t.Qwen2MoeConfig, shared_expert_intermediate_size=40, **_EXPERTS),
    "qwen3": _config(t.Qwen3Config, head_dim=16),
    "qwen3_moe": _config(t.Qwen3MoeConfig, head_dim=16, mlp_only_layers=[1], **_EXPERTS),
    "seed_oss": _config(t.SeedOssConfig, head_dim=16),
    "smollm3": _config(t.SmolLM3Config),
    "starcoder2": _config(t.Starcoder2Config, sliding_window=8),
}

# Looked at less often: their structure is that of others.
MORE_ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "afmoe": _of_type(
        "afmoe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        head_dim=16,
        sliding_window=8,
        num_shared_experts=1,
        layer_types=[_SLIDING, _FULL] * 2,
    ),
    "aria_text": _of_type("aria_text", moe_num_experts=4, moe_topk=2, head_dim=16, moe_num_shared_experts=1),
    "bitnet": _of_type(
        "bitnet",
    ),
    "cohere2_moe": _of_type(
        "cohere2_moe",
        num_experts=4,
        num_experts_per_tok=2,
        head_dim=16,
        sliding_window=8,
        num_shared_experts=1,
        layer_types=[_SLIDING, _FULL] * 2,
    ),
    "dots1": _of_type(
        "dots1",
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        sliding_window=8,
        max_window_layers=2,
    ),
    "ernie4_5_moe": _of_type(
        "ernie4_5_moe",
        num_experts=4,
        moe_num_experts=4,
        num_experts_per_tok=2,
        moe_k=2,
        moe_intermediate_size=32,
        moe_num_shared_experts=1,
    ),
    "exaone_moe": _of_type(
        "exaone_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        sliding_window=8,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        num_shared_experts=1,
        layer_types=[_SLIDING, _FULL] * 2,
    ),
    "flex_olmo": _of_type("flex_olmo", num_experts=4, num_local_experts=4, num_experts_per_tok=2),
    "granite_swa": _of_type("granite_swa", sliding_window=8, layer_types=[_SLIDING, _FULL] * 2),
    "granitemoeshared": _of_type(
        "granitemoeshared", num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=32
    ),
    "helium": _of_type("helium", head_dim=12),
    "hunyuan_v1_moe": _of_type("hunyuan_v1_moe", head_dim=16, num_experts=4, moe_topk=2),
    "hy_v3": _of_type(
        "hy_v3",
        num_experts=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        head_dim=16,
        num_shared_experts=1,
    ),
    "hyperclovax": _of_type("hyperclovax", head_dim=16),
    "internlm3": _of_type("internlm3", head_dim=16),
    "iquestcoder": _of_type("iquestcoder", head_dim=16),
    "jais2": _of_type("jais2", head_dim=16),
    "kolibri1": _of_type(
        "kolibri1",
        num_experts=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        head_dim=16,
        sliding_window=8,
        layer_types=[_SLIDING, _FULL] * 2,
    ),
    "laguna": _of_type(
        "laguna",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        head_dim=16,
        sliding_window=8,
        layer_types=[_FULL] * 4,
    ),
    "mellum": _of_type(
        "mellum",
        num_experts=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        head_dim=16,
        sliding_window=8,
        layer_types=[_FULL] * 4,
    ),
    "minimax_m2": _of_type("minimax_m2", num_experts=4, num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    "ministral": _of_type("ministral", head_dim=16, sliding_window=8),
    "solar_open": _of_type(
        "solar_open",
        num_local_experts=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        head_dim=16,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
    ),
    "vaultgemma": _of_type("vaultgemma", head_dim=16, sliding_window=8, layer_types=[_SLIDING, _FULL] * 2),
}

_folder = tempfile.TemporaryDirectory(prefix="tiny-models-")


@functools.cache
def tiny_model(architecture: str) -> Path:
    """The folder of one model and its tokenizer, made on first use and gone when the tests end. Do not change it."""
    configs = ARCHITECTURES | MORE_ARCHITECTURES
    return save_tiny_model(configs[architecture](), Path(_folder.name) / architecture)


def save_tiny_model(config: Any, folder: Path) -> Path:
    # With this seed the two best logits are never closer than 1e-4 in any token that the tests generate; rounding
    # is 50 times smaller. With another a test may fail at a tie.
    torch.manual_seed(8)
    model = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("sinks"):  # which start as all ones or zeros
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return build_tiny_tokenizer(folder)
