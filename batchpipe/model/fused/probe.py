"""How a stand-in for a module is found to be one: both are run on the same random input."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from batchpipe.attention.base import AttentionOptions

PROBE_TOKENS = 5
# Half a dozen roundings, relative to the largest number of an output.
_ROUNDINGS = 6
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swish": functional.silu,
    "gelu": lambda numbers: functional.gelu(numbers, approximate="tanh"),
}
Stand = Callable[[nn.Module], nn.Module | None]  # a module's stand-in, None where there is none that agrees


def replace_modules(model: nn.Module, stand_ins: list[Stand]) -> list[str]:
    """Replaces what has a stand-in, one kind after the other. Returns the names of the modules replaced."""
    replaced: list[str] = []
    for stand_in_for in stand_ins:
        # Names alone, so that the weights of a module go with it.
        for name in [name for name, _ in model.named_modules()]:
            try:
                module = model.get_submodule(name)
            except AttributeError:  # a part of one that was replaced
                continue
            stand_in = stand_in_for(module)
            if stand_in is not None:
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, stand_in)
                replaced.append(name)
    return replaced


def agree(outputs: Tensor, expected: Tensor) -> bool:
    if outputs.shape != expected.shape or outputs.dtype != expected.dtype:
        return False
    largest = expected.float().abs().max()
    tolerance = _ROUNDINGS * torch.finfo(expected.dtype).eps / 2
    return bool((outputs.float() - expected.float()).abs().max() <= tolerance * largest)


def random(like: Tensor, *shape: int) -> Tensor:
    """The same numbers on every device; of `like`'s type."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)


def linears_of(module: nn.Module, *names: str) -> list[nn.Linear] | None:
    """The children of these names, if all are plain linear layers: no adapter, no quantised weight."""
    children = [getattr(module, name, None) for name in names]
    return None if any(type(child) is not nn.Linear for child in children) else children  # type: ignore[return-value]


def joined(linears: list[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of several linear layers of the same input as one."""
    weight = torch.cat([linear.weight.detach() for linear in linears]) if len(linears) > 1 else linears[0].weight
    if all(linear.bias is None for linear in linears):
        return weight.detach(), None
    biases = [
        linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
        for linear in linears
    ]
    return weight.detach(), torch.cat(biases)


def activation_of(module: nn.Module, like: Tensor) -> str | None:
    """The name in `ACTIVATIONS` of a gated MLP's activation."""
    activation = getattr(module, "act_fn", None)
    numbers = random(like, 1000)
    if activation is None:
        return None
    return next((name for name, one in ACTIVATIONS.items() if agree(activation(numbers), one(numbers))), None)


def norm_weight(module: nn.Module) -> tuple[Tensor, float] | None:
    """Weight [H] and epsilon of what looks like a norm."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(epsilon, float):
        return None
    return weight, epsilon


def norm_readings(weight: Tensor) -> list[tuple[Tensor, bool]]:
    """The float32 weights, and whether numbers are rounded before them, that norms are known to have."""
    weight = weight.detach().float()
    return [(weight, True), (weight, False), (1 + weight, False)]  # Llama, GPT-OSS, Gemma


class Recorder:
    """An attention backend that computes nothing: it keeps what it was called with and gives the query back."""

    def forward(
        self, inputs: Any, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        self.tensors = [query.clone(), key.clone(), value.clone()]
        self.options = options
        return query.contiguous()


def attention_angles(like: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1, PROBE_TOKENS, head_dim]."""
    angles = random(like.float(), 1, PROBE_TOKENS, head_dim // 2).repeat(1, 1, 2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def call_attention(attention: nn.Module, backend: Recorder, like: Tensor, hidden_size: int, head_dim: int) -> Tensor:
    output: Tensor = attention(
        hidden_states=random(like, 1, PROBE_TOKENS, hidden_size),
        position_embeddings=attention_angles(like, head_dim),
        attention_mask=None,
        attention_inputs=SimpleNamespace(backend=backend, first_layer=0),
    )[0]
    return output


def takes_rotation(module: nn.Module) -> bool:
    return "position_embeddings" in inspect.signature(module.forward).parameters


def call_layer(layer: nn.Module, like: Tensor, hidden_size: int, head_dim: int) -> Tensor:
    output: Tensor = layer(
        random(like, 1, PROBE_TOKENS, hidden_size),
        position_embeddings=attention_angles(like, head_dim),
        attention_mask=None,
        attention_inputs=SimpleNamespace(backend=Recorder(), first_layer=0),
    )
    return output
