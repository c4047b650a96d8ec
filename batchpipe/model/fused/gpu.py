"""Stand-ins for the common parts of a decoder layer on a GPU, in Triton."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from batchpipe.model.fused.gpu_modules import GpuAttention, GpuLayer, GpuMlp, GpuRmsNorm
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
from batchpipe.model.fused.triton_kernels import HeadNorms


def fuse_on_gpu(model: nn.Module) -> list[str]:
    """Returns the names of the modules replaced."""
    replaced = replace_modules(model, [_attention, _mlp, _rms_norm, _layer])
    for owner in model.modules():
        layers = getattr(owner, "layers", None)
        if isinstance(layers, nn.ModuleList):
            _link([*layers], getattr(owner, "norm", None))
    return replaced


def _link(layers: list[nn.Module], last_norm: object) -> None:
    """Each layer takes its last sum together with the norm that comes behind it."""
    for layer, following in pairwise(layers):
        if isinstance(layer, GpuLayer) and isinstance(following, GpuLayer):
            layer.follow_with(following.input_layernorm)
    if layers and isinstance(layers[-1], GpuLayer) and isinstance(last_norm, GpuRmsNorm):
        layers[-1].follow_with(last_norm)


def _rms_norm(module: nn.Module) -> nn.Module | None:
    found = norm_weight(module)
    if found is None or isinstance(module, GpuRmsNorm):
        return None
    probe = random(found[0], PROBE_TOKENS, len(found[0]))
    expected: Tensor = module(probe)
    stand_ins = [
        GpuRmsNorm(weight, found[1], rounded_first=rounded_first) for weight, rounded_first in norm_readings(found[0])
    ]
    nearest = min(stand_ins, key=lambda stand_in: float((stand_in(probe) - expected).float().norm()))
    return nearest if agree(nearest(probe), expected) else None


def _mlp(module: nn.Module) -> nn.Module | None:
    linears = linears_of(module, "gate_proj", "up_proj", "down_proj")
    if linears is None:
        return None
    like = linears[0].weight
    activation = activation_of(module, like)
    if activation is None:
        return None
    probe = random(like, 1, PROBE_TOKENS, linears[0].in_features)
    expected: Tensor = module(probe)
    stand_in = GpuMlp(*linears, activation=activation)
    return stand_in if agree(stand_in(probe), expected) else None


def _attention(module: nn.Module) -> nn.Module | None:
    linears = linears_of(module, "q_proj", "k_proj", "v_proj", "o_proj")
    head_dim = getattr(module, "head_dim", None)
    if linears is None or not isinstance(head_dim, int) or not takes_rotation(module):
        return None
    expected, outputs = Recorder(), Recorder()
    call: Callable[[nn.Module, Recorder], Tensor] = partial(
        call_attention, like=linears[0].weight, hidden_size=linears[0].in_features, head_dim=head_dim
    )
    try:
        expected_output = call(module, expected)
    except (TypeError, RuntimeError):  # it takes other arguments, or angles of another shape
        return None
    for norms in _head_norms(module):
        stand_in = GpuAttention(module, expected.options, norms)
        pairs = [(call(stand_in, outputs), expected_output), *zip(outputs.tensors, expected.tensors, strict=True)]
        if all(agree(*pair) for pair in pairs):
            return stand_in
    return None


def _head_norms(module: nn.Module) -> list[HeadNorms | None]:
    """What the module may do to query and key heads before it rotates them."""
    parts = [getattr(module, name, None) for name in ("q_norm", "k_norm")]
    if all(part is None for part in parts):
        return [None]
    found = [norm_weight(part) for part in parts if isinstance(part, nn.Module)]
    if len(found) != 2 or found[0] is None or found[1] is None or len(found[0][0]) != module.head_dim:
        return []
    (query, epsilon), (key, _) = found[0], found[1]
    return [
        HeadNorms(query_weight, key_weight, epsilon, rounded_first=rounded_first)
        for (query_weight, rounded_first), (key_weight, _) in zip(norm_readings(query), norm_readings(key), strict=True)
    ]


def _layer(module: nn.Module) -> nn.Module | None:
    """After its parts: a layer of exactly these four, whose own code adds and norms as the stand-in does."""
    parts = dict(module.named_children())
    if set(parts) != {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}:
        return None
    attention = parts["self_attn"]
    norms = (parts["input_layernorm"], parts["post_attention_layernorm"])
    if not isinstance(attention, GpuAttention) or not all(isinstance(norm, GpuRmsNorm) for norm in norms):
        return None
    like = next(attention.parameters())
    call: Callable[[nn.Module], Tensor] = partial(
        call_layer, like=like, hidden_size=attention.hidden_size, head_dim=attention.head_dim
    )
    expected, stand_in = call(module), GpuLayer(module)
    return stand_in if agree(call(stand_in), expected) else None
