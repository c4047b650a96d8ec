"""What a model folder says of itself before any weight is read: geometry, limits, sizes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from batchpipe.cost.model_shape import ModelShape
from batchpipe.kv.layout import ITEM_BYTES
from batchpipe.model.architectures import check_supported
from batchpipe.model.checkpoint import (
    check_is_plain_model,
    has_weights,
    read_json,
    read_tensors,
    stored_dtype,
    unpacked_shapes,
)
from batchpipe.model.context import max_context_tokens
from batchpipe.model.generation_config import end_token_ids
from batchpipe.model.text_part import is_multimodal, is_text_tensor, load_config, text_settings

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo(ModelShape):
    """One model, as it will be run. Bytes are those of `dtype`, not of the files."""

    folder: Path
    trust_remote_code: bool
    architecture: str
    max_context_tokens: int  # prompt and completion together
    eos_token_ids: tuple[int, ...]
    other_weight_bytes: int  # embedding, last norm, and the head where it is not the embedding again

    @property
    def weight_bytes(self) -> int:
        return sum(self.layer_weight_bytes) + self.other_weight_bytes


def model_dtype(folder: Path, dtype: str = "auto", *, device: str = "cpu", needs_weights: bool = True) -> str:
    """The type that the model computes in: `dtype`, or for auto that of the weights where the device is fast in it.

    By the weight files' headers; by config.json alone where `needs_weights` is false and there are none. Raises
    ModelError.
    """
    if dtype != "auto":
        return dtype
    stored = stored_dtype(read_tensors(folder)) if needs_weights or has_weights(folder) else None
    if stored is None:
        config = read_json(folder / "config.json")
        stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    # Processors have fast products in bfloat16, and none in float16.
    if stored not in ITEM_BYTES or (stored == "float16" and device == "cpu"):
        return "bfloat16"
    return stored


def describe_model(
    folder: Path,
    dtype: str = "auto",
    *,
    name: str | None = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    needs_weights: bool = True,
    context_tokens: int | None = None,
) -> ModelInfo:
    """Reads config.json and the weight files' headers.

    name: what the job calls the model; the folder's name where it is None.
    needs_weights: if false and the folder has no weight files, sizes are those of the model that config.json makes.
    dtype: auto (that of the weights), bfloat16, float16 or float32.
    context_tokens: the longest context if the job sets it; see `batchpipe.model.context`.

    Raises ModelError where the folder is incomplete, damaged, or holds a model that cannot run.
    """
    check_is_plain_model(folder)
    stored_config = read_json(folder / "config.json")
    check_supported(text_settings(stored_config), trust_remote_code=trust_remote_code)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    if needs_weights or has_weights(folder):
        shapes = unpacked_shapes(read_tensors(folder))
        if is_multimodal(stored_config):
            shapes = {name: shape for name, shape in shapes.items() if is_text_tensor(name)}
    else:
        from batchpipe.model.from_config import tensor_shapes

        shapes = tensor_shapes(folder, config, trust_remote_code)
    dtype = model_dtype(folder, dtype, device=device, needs_weights=needs_weights)
    layer_elements, layer_active_elements, other_elements = _count_elements(shapes, config)
    item_bytes = ITEM_BYTES[dtype]
    return ModelInfo(
        name=name or folder.name,
        folder=folder,
        trust_remote_code=trust_remote_code,
        architecture=(config.architectures or [config.model_type])[0],
        dtype=dtype,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        hidden_size=config.hidden_size,
        vocabulary_size=config.vocab_size,
        max_context_tokens=max_context_tokens(config, context_tokens),
        eos_token_ids=end_token_ids(folder, config.eos_token_id),
        layer_flops=tuple(2.0 * elements for elements in layer_active_elements),
        layer_weight_bytes=tuple(elements * item_bytes for elements in layer_elements),
        other_weight_bytes=other_elements * item_bytes,
    )


def _count_elements(shapes: dict[str, tuple[int, ...]], config: Any) -> tuple[list[int], list[float], int]:
    """Numbers in each layer, those of them that one token is multiplied with, and numbers outside the layers."""
    num_experts = next((n for key in _EXPERT_COUNTS if (n := getattr(config, key, None))), 1)
    active_share = (getattr(config, "num_experts_per_tok", None) or num_experts) / num_experts
    layer_elements = [0] * config.num_hidden_layers
    active_elements = [0.0] * config.num_hidden_layers
    other_elements = 0
    for name, shape in shapes.items():
        found = _LAYER.search(name)
        if found and int(found[1]) < len(layer_elements):
            # Experts have a tensor each, or one tensor [num_experts, ...] for all of them.
            is_of_experts = ".experts." in name or (len(shape) == 3 and shape[0] == num_experts)
            layer_elements[int(found[1])] += prod(shape)
            active_elements[int(found[1])] += prod(shape) * (active_share if is_of_experts else 1.0)
        else:
            other_elements += prod(shape)
    return layer_elements, active_elements, other_elements
