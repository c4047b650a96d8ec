"""A small random model of the same kind as a large one: the same code, the same kinds of layers, little memory."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from batchpipe.errors import ModelError
from batchpipe.model.quiet import quiet_transformers
from batchpipe.model.text_part import load_config

VOCABULARY_SIZE = 512
WINDOW_TOKENS = 8
_MOST_LAYERS = 12
_MOST_PARAMETERS = 1_000_000_000
# What only makes a layer large, by the words that its key in config.json ends with, and what a twin has of it at most.
_AT_MOST = {
    "intermediate_size": 64,
    "ffn_dim": 64,
    "ffn_hidden_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_routed_experts": 4,
    "num_experts_per_tok": 2,
    "experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "sliding_window": WINDOW_TOKENS,
}


def twin_changes(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of config.json a twin has otherwise. Pure.

    As many layers, at least four where there are, as it takes until every kind of each list with an entry per layer has
    occurred.
    """
    num_layers = config["num_hidden_layers"]
    by_layer = {
        key: value for key, value in config.items() if isinstance(value, list | tuple) and len(value) == num_layers
    }
    num_twin_layers = min(num_layers, 4)
    for kinds in by_layer.values():
        firsts = [kinds.index(kind) for kind in {repr(kind): kind for kind in kinds}.values()]
        num_twin_layers = max(num_twin_layers, min(max(firsts) + 1, _MOST_LAYERS))
    changes: dict[str, Any] = {key: list(value)[:num_twin_layers] for key, value in by_layer.items()}
    changes |= {"num_hidden_layers": num_twin_layers, "vocab_size": VOCABULARY_SIZE}
    for key, value in config.items():
        if key in ("bos_token_id", "eos_token_id", "pad_token_id") and value is not None:
            changes[key] = [2] if isinstance(value, list) else 2
        limit = next((limit for name, limit in _AT_MOST.items() if key.endswith(name)), None)
        if limit is not None and isinstance(value, int) and not isinstance(value, bool):
            changes[key] = min(value, limit)
    return changes


def save_twin(folder: Path, into: Path, *, trust_remote_code: bool) -> None:
    """Writes a twin of the model in `folder`, in float32: the same one every time.

    Raises ModelError where it cannot be made small, and what transformers raises of settings that do not go together.
    """
    config = load_config(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "num_hidden_layers", None) is None:
        raise ModelError("model.name: its configuration has no number of layers")
    # Some types have another name for it in their files.
    for key, value in twin_changes(config.to_dict() | {"num_hidden_layers": config.num_hidden_layers}).items():
        setattr(config, key, value)
    config.dtype = "float32"
    _refuse_large(config, trust_remote_code=trust_remote_code)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code, attn_implementation="eager"
        )
        _make_loud(model)
        model.save_pretrained(str(into))
    for code in folder.glob("*.py"):
        shutil.copy(code, into)


def _refuse_large(config: Any, *, trust_remote_code: bool) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    if num_parameters > _MOST_PARAMETERS:
        raise ModelError(f"model.name: it cannot be made small: {num_parameters / 1e9:.1f} billion parameters are left")


@torch.no_grad()
def _make_loud(model: nn.Module) -> None:
    """Weights as they are made for training hardly let a token see the others, and all norms are the same."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.copy_(torch.randn_like(parameter) * 1.5 * parameter.shape[-1] ** -0.5)
        elif "norm" in name or name.endswith("sinks"):
            parameter.add_(torch.randn_like(parameter) * 0.2)
