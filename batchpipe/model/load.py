"""A pipeline stage of a transformers causal language model, holding its own layers' weights and no others.

first stage        middle stage         last stage
embed_tokens       -                    (the tied embedding)
layers 0..a        layers a..b          layers b..n
-                  -                    norm, lm_head
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from batchpipe.attention.base import AttentionInputs, AttentionOptions
from batchpipe.errors import ModelError
from batchpipe.model.architectures import SUPPORTED
from batchpipe.model.checkpoint import read_json
from batchpipe.model.mask_window import MaskProbe, marked_masks, probe_inputs
from batchpipe.model.quiet import quiet_transformers
from batchpipe.model.text_part import TEXT_NAMES, is_multimodal, load_config

ATTENTION_NAME = "batchpipe"


def load_stage(
    folder: Path,
    layers: range,
    *,
    is_first: bool,
    is_last: bool,
    dtype: torch.dtype,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> StageModel:
    """Reads the tensors of `layers`, with the embedding on the first and the head on the last stage.

    Weights already in `dtype` stay mapped pages of their files on the CPU. Raises ModelError where a tensor is
    missing or of another shape, or the model's structure is not that of a plain decoder.
    """
    try:
        config = load_config(folder, trust_remote_code=trust_remote_code)
        model_class = _stage_class(folder, config, layers, is_first, is_last, trust_remote_code)
        with quiet_transformers():
            model, report = model_class.from_pretrained(
                str(folder),
                config=config,
                dtype=dtype,
                attn_implementation=ATTENTION_NAME,
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # reported below, and better
                output_loading_info=True,
                key_mapping=TEXT_NAMES if is_multimodal(read_json(folder / "config.json")) else None,
            )
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError) as error:
        has_own_attention = error.args == (ATTENTION_NAME,)
        said = "its code has attention of its own, which cannot be replaced" if has_own_attention else error
        raise ModelError(f"model.name: {folder} cannot be loaded: {said}") from error
    _check_complete(folder, model, report)
    model = model.to(device).eval()
    if getattr(config, "sliding_window", None) or config.model_type not in SUPPORTED:
        _take_windows_of_masks(model, is_first=is_first, dtype=dtype)
    return StageModel(model, is_last=is_last)


@torch.inference_mode()
def _take_windows_of_masks(model: Any, *, is_first: bool, dtype: torch.dtype) -> None:
    inputs = probe_inputs(model, is_first=is_first, device=model.device, dtype=dtype)
    with marked_masks(ATTENTION_NAME):
        model.base_model(**inputs, use_cache=False, attention_inputs=MaskProbe())


def _check_complete(folder: Path, model: Any, report: dict[str, Any]) -> None:
    """Every tensor of the stage came from the checkpoint; transformers alone would make up the rest at random."""
    for name, stored_shape, expected_shape in sorted(report["mismatched_keys"]):
        raise ModelError(
            f"model.name: {name} in {folder} has the shape {list(stored_shape)} and config.json asks for "
            f"{list(expected_shape)}; the weights belong to another configuration"
        )
    missing = sorted(report["missing_keys"])
    missing += [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing:
        raise ModelError(
            f"model.name: {folder} lacks {len(missing)} tensors that {type(model).__name__} needs, "
            f"the first of them {missing[0]}"
        )


class StageModel(nn.Module):
    """A loaded stage. `model` is the transformers model it was cut from."""

    def __init__(self, model: Any, *, is_last: bool) -> None:
        super().__init__()
        self.model = model
        self._is_last = is_last

    @torch.inference_mode()
    def forward(
        self, inputs: AttentionInputs, source: Tensor, position_ids: Tensor, logit_rows: Tensor | None = None
    ) -> Tensor:
        """One pass over T packed tokens of several sequences.

        source: token ids [T] on the first stage, hidden states [T, hidden_size] on the others.
        position_ids: [T], each token's place in its own sequence.
        logit_rows: [R] indices into T, on the last stage only: the head is applied to these alone.
        Returns hidden states [T, hidden_size], or logits [R, vocabulary_size] on the last stage.
        """
        kind = "inputs_embeds" if source.is_floating_point() else "input_ids"
        arguments = {
            kind: source[None],
            "position_ids": position_ids[None],
            "use_cache": False,
            "attention_inputs": inputs,
        }
        if not self._is_last:
            hidden: Tensor = self.model.base_model(**arguments).last_hidden_state
            return hidden[0]
        assert logit_rows is not None, "the last stage needs the rows to make logits of"
        logits: Tensor = self.model(**arguments, logits_to_keep=logit_rows).logits
        return logits[0]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    attention_inputs: AttentionInputs | MaskProbe,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: query [1, Hq, T, D], key and value [1, Hkv, T, D] -> [1, T, Hq, D]."""
    window = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    if isinstance(attention_inputs, MaskProbe):
        attention_inputs.see(module, attention_mask, window)
        return query.transpose(1, 2).contiguous(), None
    assert attention_mask is None, "packed sequences have no mask"
    assert isinstance(module.layer_idx, int)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = getattr(module, "mask_window", window)
    query, key, value = (heads[0].transpose(0, 1) for heads in (query, key, value))
    layer = module.layer_idx - attention_inputs.first_layer
    options = AttentionOptions(scale, window, softcap, s_aux)
    output = attention_inputs.backend.forward(attention_inputs, layer, query, key, value, options)
    return output[None], None


# Without a mask function of this name transformers makes no mask at all.
AttentionInterface.register(ATTENTION_NAME, _attend)


class _OtherStagesLayer(nn.Module):
    """Stands where another stage's layer would: passes hidden states on, so that the layers keep their numbers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name in ("attention_type", "layer_type"):  # read by the model's own loop over its layers
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def _stage_class(
    folder: Path, config: Any, layers: range, is_first: bool, is_last: bool, trust_remote_code: bool
) -> Any:
    """The model's own class, cut to one stage. So names, tying, fusing and buffers stay transformers' business."""
    base = causal_lm_class(folder, config, trust_remote_code)

    def init(self: Any, config: Any) -> None:
        base.__init__(self, config)
        _cut(self, layers, is_first, is_last)

    attributes: dict[str, Any] = {
        "__module__": base.__module__,  # transformers looks for the source of the class there
        "__init__": init,
        "_keys_to_ignore_on_load_unexpected": [".*"],  # the other stages' tensors
    }
    if not is_last:
        attributes["_tied_weights_keys"] = {}
    return type(base.__name__, (base,), attributes)


def causal_lm_class(folder: Path, config: Any, trust_remote_code: bool) -> Any:
    """The transformers class of this configuration, or the one that comes with the model."""
    own_code = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if own_code and trust_remote_code and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return get_class_from_dynamic_module(own_code, str(folder))
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _cut(model: Any, layers: range, is_first: bool, is_last: bool) -> None:
    """Takes what belongs to other stages out of a model on the meta device."""
    backbone = model.base_model
    for owner, name in ((backbone, "embed_tokens"), (backbone, "layers"), (backbone, "norm"), (model, "lm_head")):
        if not isinstance(getattr(owner, name, None), nn.Module):
            raise ModelError(f"model.name: {type(model).__name__} has no `{name}`; only plain decoders can run")
    for index, layer in enumerate(backbone.layers):
        if index not in layers:
            backbone.layers[index] = _OtherStagesLayer(layer)
    if not is_last:
        backbone.norm = nn.Identity()
        model.lm_head = nn.Identity()
    if not is_first:
        if not (is_last and model.config.tie_word_embeddings):
            backbone.embed_tokens = nn.Identity()
        if hasattr(backbone, "embedding_multiplier"):  # is for embeddings, but multiplies whatever comes in
            backbone.embedding_multiplier = 1.0
