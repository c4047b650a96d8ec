"""Stand-ins for the common parts of a decoder layer on a CPU: bfloat16, by oneDNN and the C kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from batchpipe.model.fused.cpu_modules import FusedAttention, FusedLayer, FusedMlp, FusedRmsNorm, PackedLinear
from batchpipe.model.fused.probe import (
    PROBE_TOKENS,
    Recorder,
    activation_of,
    agree,
    call_attention,
    call_layer,
    linears_of,
    norm_readings,
    norm_weight,
    random,
    replace_modules,
    takes_rotation,
)
from batchpipe.native.build import load_kernels

_LIKE = torch.empty(0, dtype=torch.bfloat16)


def fuse_on_cpu(model: nn.Module) -> list[str]:
    """Returns the names of the modules replaced: none but on a CPU that has instructions for bfloat16.

    A head whose weight is the embedding too is packed beside it: its product is a fifth of a small model's work, and a
    quarter faster packed.
    """
    kernels = load_kernels() if torch.ops.mkldnn._is_mkldnn_bf16_supported() else None
    if kernels is None:
        return []
    return replace_modules(model, [partial(one, kernels) for one in (_attention, _mlp, _rms_norm)] + [_linear, _layer])


def _linear(module: nn.Module) -> nn.Module | None:
    return PackedLinear([module]) if type(module) is nn.Linear else None


def _rms_norm(kernels: ctypes.CDLL, module: nn.Module) -> nn.Module | None:
    found = norm_weight(module)
    if found is None:
        return None
    probe = random(_LIKE, PROBE_TOKENS, len(found[0]))
    expected: Tensor = module(probe)
    stand_ins = [
        FusedRmsNorm(kernels, weight, found[1], rounded_first=rounded_first)
        for weight, rounded_first in norm_readings(found[0])
    ]
    nearest = min(stand_ins, key=lambda stand_in: float((stand_in(probe) - expected).float().norm()))
    return nearest if agree(nearest(probe), expected) else None


def _mlp(kernels: ctypes.CDLL, module: nn.Module) -> nn.Module | None:
    linears = linears_of(module, "gate_proj", "up_proj", "down_proj")
    activation = None if linears is None else activation_of(module, _LIKE)
    if linears is None or activation is None:
        return None
    stand_in = FusedMlp(*linears, activation=activation)
    probe = random(_LIKE, 1, PROBE_TOKENS, linears[0].in_features)
    return stand_in if agree(stand_in(probe), module(probe)) else None


def _attention(kernels: ctypes.CDLL, module: nn.Module) -> nn.Module | None:
    linears = linears_of(module, "q_proj", "k_proj", "v_proj", "o_proj")
    head_dim = getattr(module, "head_dim", None)
    if linears is None or not isinstance(head_dim, int) or not takes_rotation(module):
        return None
    expected, outputs = Recorder(), Recorder()
    call = partial(call_attention, like=_LIKE, hidden_size=linears[0].in_features, head_dim=head_dim)
    try:
        expected_output = call(module, expected)
    except (TypeError, RuntimeError):  # it takes other arguments, or angles of another shape
        return None
    stand_in = FusedAttention(kernels, module, expected.options)
    pairs = [(call(stand_in, outputs), expected_output), *zip(outputs.tensors, expected.tensors, strict=True)]
    return stand_in if all(agree(*pair) for pair in pairs) else None


def _layer(module: nn.Module) -> nn.Module | None:
    """After its parts: a layer of exactly these four, whose own code adds and norms as the stand-in does."""
    parts = dict(module.named_children())
    if set(parts) != {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}:
        return None
    attention, mlp = parts["self_attn"], parts["mlp"]
    if not isinstance(attention, FusedAttention) or not isinstance(mlp, FusedMlp):
        return None
    stand_in = FusedLayer(module, attention, mlp)
    call: Callable[[nn.Module], Tensor] = partial(
        call_layer, like=_LIKE, hidden_size=mlp.in_features, head_dim=attention.head_dim
    )
    return stand_in if agree(call(stand_in), call(module)) else None
