"""The language model inside a multimodal one: prompts of text alone never meet the other parts. No torch.

config.json of such a model holds the text's settings in a part of their own, or, in older files, beside the others';
the names of its tensors say which of them belong to the language model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from batchpipe.errors import ModelError
from batchpipe.model.checkpoint import read_json

# What the text part of each multimodal type is as a language model; None: what the part itself says.
_TEXT_TYPES: dict[str, str | None] = {
    "gemma3": "gemma3_text",
    "mistral3": None,
    "llava": None,
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
}
# What such a part does without saying so.
_UNSAID: dict[str, dict[str, Any]] = {"qwen3_vl_moe": {"norm_topk_prob": True}}
_OTHER_PARTS = ("vision_config", "audio_config")
# Of the whole model, and of the text as well.
_SHARED = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype", "torch_dtype", "auto_map")
# A tensor's name as a pattern, and as the language model alone calls it.
TEXT_NAMES = {
    r"^language_model\.model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
    r"^model\.language_model\.": "model.",
}
_TEXT_PREFIXES = (
    "language_model.",
    "model.language_model.",
    "model.layers.",
    "model.embed_tokens.",
    "model.norm.",
    "lm_head.",
)


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Whether config.json is that of a multimodal model whose text part runs."""
    return config.get("model_type") in _TEXT_TYPES


def text_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the text part alone; of any other model the same as it is."""
    if not is_multimodal(config):
        return dict(config)
    text = dict(config.get("text_config") or {key: value for key, value in config.items() if key not in _OTHER_PARTS})
    text |= {key: config[key] for key in _SHARED if key in config}
    text["model_type"] = _TEXT_TYPES[config["model_type"]] or text.get("model_type")
    text |= _UNSAID.get(config["model_type"], {})
    text["architectures"] = list(config.get("architectures") or ())
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(text.get(key), Mapping):
            text[key] = _for_text(text[key])
    return text


def _for_text(rope: Mapping[str, Any]) -> dict[str, Any] | None:
    """Without what tells apart the three places of a picture's token: those of a text's token are one number."""
    if not any(key.startswith("mrope") for key in rope):
        return dict(rope)
    kept = {key: value for key, value in rope.items() if not key.startswith("mrope") and value != "mrope"}
    if set(kept) <= {"type", "rope_type"}:
        return None
    return {"rope_type": "default"} | kept


def is_text_tensor(name: str) -> bool:
    return name.startswith(_TEXT_PREFIXES)


def load_config(folder: Path, *, trust_remote_code: bool) -> Any:
    """The configuration of the language model in the folder. Raises ModelError where transformers refuses it."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        settings = read_json(folder / "config.json")
        if not is_multimodal(settings):
            return AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        text = text_settings(settings)
        return CONFIG_MAPPING[text.pop("model_type")].from_dict(text)
    except Exception as error:  # each model's own checks, and its own code's, raise what they like
        raise ModelError(f"model.name: {folder / 'config.json'} is not understood: {error}") from error
