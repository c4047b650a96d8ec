"""Replaces parts of a loaded transformers model by faster ones that are seen to compute the same.

transformers has hundreds of architectures, and a part's name says little about what it does. So nothing is replaced
on its name: a stand-in is built where a module has the right pieces, both are run on the same random input, and only
one that agrees to bfloat16's rounding stays. Whatever differs (a clipped projection, a norm on queries, another
rotation) is left as it is.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from batchpipe.attention.base import AttentionOptions
from batchpipe.model.fused_modules import (
    FusedAttention,
    FusedLayer,
    FusedMlp,
    FusedRmsNorm,
    PackedLinear,
)
from batchpipe.native.build import load_kernels

PROBE_TOKENS = 5
# Half a dozen roundings of bfloat16, relative to the largest number of an output.
TOLERANCE = 6 * 2.0**-8
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swish": functional.silu,
    "gelu": lambda numbers: functional.gelu(numbers, approximate="tanh"),
}


@torch.inference_mode()
def fuse(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Returns the names of the modules replaced: none but in bfloat16 on a CPU that has instructions for it.

    float32 is left alone: its greedy tokens are promised to be those of transformers. A head whose weight is the
    embedding too is packed beside it: its product is a fifth of a small model's work, and a quarter faster packed.
    """
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    if dtype != torch.bfloat16 or not on_cpu or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return []
    kernels = load_kernels()
    if kernels is None:
        return []
    replaced: list[str] = []
    for stand_in_for in (_attention, _mlp, _rms_norm, _linear, _layer):
        for name, module in list(model.named_modules()):
            stand_in = stand_in_for(module, kernels)
            if stand_in is not None:
                _replace(model, name, stand_in)
                replaced.append(name)
    return replaced


def _replace(model: nn.Module, name: str, stand_in: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, stand_in)


def _agree(outputs: Tensor, expected: Tensor) -> bool:
    if outputs.shape != expected.shape or outputs.dtype != expected.dtype:
        return False
    largest = expected.float().abs().max()
    return bool((outputs.float() - expected.float()).abs().max() <= TOLERANCE * largest)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def _linears(module: nn.Module, *names: str) -> list[nn.Linear] | None:
    """The children of these names, if all are plain linear layers: no adapter, no quantised weight."""
    children = [getattr(module, name, None) for name in names]
    return None if any(type(child) is not nn.Linear for child in children) else children  # type: ignore[return-value]


def _linear(module: nn.Module, kernels: ctypes.CDLL) -> nn.Module | None:
    return PackedLinear([module]) if type(module) is nn.Linear else None


def _rms_norm(module: nn.Module, kernels: ctypes.CDLL) -> nn.Module | None:
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(epsilon, float):
        return None
    probe = _random(PROBE_TOKENS, len(weight))
    expected = module(probe)
    stand_ins = [
        FusedRmsNorm(kernels, weight, epsilon, rounded_first=True),  # Llama
        FusedRmsNorm(kernels, weight, epsilon, rounded_first=False),  # GPT-OSS
        FusedRmsNorm(kernels, 1 + weight.float(), epsilon, rounded_first=False),  # Gemma
    ]
    nearest = min(stand_ins, key=lambda stand_in: float((stand_in(probe) - expected).float().norm()))
    return nearest if _agree(nearest(probe), expected) else None


def _mlp(module: nn.Module, kernels: ctypes.CDLL) -> nn.Module | None:
    linears = _linears(module, "gate_proj", "up_proj", "down_proj")
    activation = getattr(module, "act_fn", None)
    if linears is None or activation is None:
        return None
    numbers = _random(1000)
    for name, function in ACTIVATIONS.items():
        if _agree(activation(numbers), function(numbers)):
            stand_in = FusedMlp(*linears, activation=name)
            probe = _random(1, PROBE_TOKENS, linears[0].in_features)
            return stand_in if _agree(stand_in(probe), module(probe)) else None
    return None


class _Recorder:
    """An attention backend that computes nothing: it keeps what it was called with and gives the query back."""

    def forward(
        self, inputs: Any, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        self.tensors = [query.clone(), key.clone(), value.clone()]
        self.options = options
        return query.contiguous()


def _attention(module: nn.Module, kernels: ctypes.CDLL) -> nn.Module | None:
    linears = _linears(module, "q_proj", "k_proj", "v_proj", "o_proj")
    head_dim = getattr(module, "head_dim", None)
    takes = inspect.signature(module.forward).parameters
    if linears is None or not isinstance(head_dim, int) or "position_embeddings" not in takes:
        return None
    angles = _random(1, PROBE_TOKENS, head_dim // 2).repeat(1, 1, 2).float()
    expected, outputs = _Recorder(), _Recorder()

    def call(attention: nn.Module, backend: _Recorder) -> Tensor:
        output: Tensor = attention(
            hidden_states=_random(1, PROBE_TOKENS, linears[0].in_features),
            position_embeddings=(angles.cos().bfloat16(), angles.sin().bfloat16()),
            attention_mask=None,
            attention_inputs=SimpleNamespace(backend=backend, first_layer=0),
        )[0]
        return output

    try:
        expected_output = call(module, expected)
    except (TypeError, RuntimeError):  # it takes other arguments, or angles of another shape
        return None
    stand_in = FusedAttention(kernels, module, expected.options)
    pairs = [(call(stand_in, outputs), expected_output), *zip(outputs.tensors, expected.tensors, strict=True)]
    return stand_in if all(_agree(*pair) for pair in pairs) else None


def _layer(module: nn.Module, kernels: ctypes.CDLL) -> nn.Module | None:
    """After its parts: a layer of exactly these four, whose own code adds and norms as the stand-in does."""
    parts = dict(module.named_children())
    if set(parts) != {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}:
        return None
    attention, mlp = parts["self_attn"], parts["mlp"]
    if not isinstance(attention, FusedAttention) or not isinstance(mlp, FusedMlp):
        return None
    angles = _random(1, PROBE_TOKENS, attention.head_dim // 2).repeat(1, 1, 2)

    def call(layer: nn.Module) -> Tensor:
        output: Tensor = layer(
            _random(1, PROBE_TOKENS, mlp.in_features),
            position_embeddings=(angles.cos(), angles.sin()),
            attention_mask=None,
            attention_inputs=SimpleNamespace(backend=_Recorder(), first_layer=0),
        )
        return output

    stand_in = FusedLayer(module, attention, mlp)
    return stand_in if _agree(call(stand_in), call(module)) else None
