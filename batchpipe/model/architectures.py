"""Which architectures run, and why the others do not. No torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from batchpipe.errors import ModelError

# Model types whose greedy tokens are compared with those of transformers' own generate in the tests.
SUPPORTED = (
    "afmoe",
    "apertus",
    "arcee",
    "aria_text",
    "bitnet",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "dots1",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "exaone_moe",
    "flex_olmo",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt_oss",
    "granite",
    "granite_swa",
    "granitemoe",
    "granitemoehybrid",
    "granitemoeshared",
    "helium",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "hy_v3",
    "hyperclovax",
    "internlm3",
    "iquestcoder",
    "jais2",
    "kolibri1",
    "laguna",
    "llama",
    "mellum",
    "minimax_m2",
    "ministral",
    "ministral3",
    "mistral",
    "mixtral",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "solar_open",
    "starcoder2",
    "vaultgemma",
)

_RUNNING_LAYER_TYPES = {"attention", "full_attention", "sliding_attention"}
# Of layers that a model may have; its own list of layers says whether it has any.
_STATE_SPACE_KEYS = {"mamba_d_state", "state_size", "linear_num_value_heads"}
# A key of config.json that gives away what the engine's paged attention cannot do.
_TELLTALES = {
    "kv_lora_rank": "multi-head latent attention",
    "ssm_cfg": "state-space layers",
    "state_size": "state-space layers",
    "mamba_d_state": "state-space layers",
    "linear_num_value_heads": "linear-attention layers",
    "attention_chunk_size": "chunked attention",
    "vision_config": "a vision part",
    "audio_config": "an audio part",
    "audio_vocab_size": "an audio part",
    "alibi": "ALiBi position biases",
}


def check_supported(config: Mapping[str, Any], *, trust_remote_code: bool) -> None:
    """Takes config.json; raises ModelError naming the architecture and what of it does not run.

    A type of transformers that is not on the tested list passes, and so does a model that brings its own code with
    `trust_remote_code`: `self_check` looks at these before they are loaded.
    """
    architecture = ", ".join(config.get("architectures") or ()) or "an unnamed architecture"
    name = f"{architecture} (model_type {config.get('model_type')!r})"
    if reason := _obstacle(config):
        raise ModelError(f"model.name: {name} cannot run: it has {reason}. {_advice()}")
    if config.get("model_type") in SUPPORTED:
        return
    if "auto_map" not in config:
        if config.get("model_type") in _causal_language_models():
            return
        raise ModelError(f"model.name: {name} is not supported. {_advice()}")
    if not trust_remote_code:
        raise ModelError(
            f"model.name: {name} needs the Python code that comes with it; read that code, "
            "then set model.trust_remote_code to true"
        )


def _obstacle(config: Mapping[str, Any]) -> str | None:
    if config.get("is_encoder_decoder"):
        return "an encoder"
    layer_types = set(config.get("layer_types") or ())
    has_attention_alone = bool(layer_types) and layer_types <= _RUNNING_LAYER_TYPES
    for key, reason in _TELLTALES.items():
        if config.get(key) and not (has_attention_alone and key in _STATE_SPACE_KEYS):
            return reason
    unknown = layer_types - _RUNNING_LAYER_TYPES
    return f"layers of type {', '.join(sorted(unknown))}" if unknown else None


def _causal_language_models() -> Collection[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names: Collection[str] = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return names


def _advice() -> str:
    return f"Supported model types: {', '.join(SUPPORTED)}"
