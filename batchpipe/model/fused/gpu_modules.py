"""Faster stand-ins for the common parts of a decoder layer on a GPU: bfloat16 or float16, inference only.

A layer is four products, attention, and one launch between each two of them. Each stand-in takes over the weights of
its module and computes the same to rounding. H hidden size, T tokens, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from batchpipe.attention.base import AttentionInputs, AttentionOptions
from batchpipe.model.fused.probe import joined
from batchpipe.model.fused.triton_kernels import HeadNorms, add_rms_norm, gated, rms_norm, rotate


class JoinedLinear(nn.Module):
    """Linear layers of the same input as one."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        super().__init__()
        self._weight, self._bias = joined(linears)

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self._weight, self._bias)


class GpuRmsNorm(nn.Module):
    """Root mean square norm by a float32 weight, with a rounding before it where `rounded_first`.

    The layer before may have computed it already, together with the sum that is its input (`add`).
    """

    def __init__(self, weight: Tensor, epsilon: float, *, rounded_first: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.epsilon = epsilon
        self.rounded_first = rounded_first
        self._ahead: tuple[Tensor, Tensor] | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] is hidden:
            return ahead[1]
        return rms_norm(hidden, self.weight, self.epsilon, rounded_first=self.rounded_first)

    def add(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(the norm of the sum, the sum)."""
        return add_rms_norm(hidden, residual, self.weight, self.epsilon, rounded_first=self.rounded_first)

    def add_ahead(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """The sum; `forward` of it will have its norm at hand."""
        normed, summed = self.add(hidden, residual)
        self._ahead = (summed, normed)
        return summed


class GpuMlp(nn.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, *, activation: str) -> None:
        super().__init__()
        self.in_features = gate.in_features
        self._gate_up = JoinedLinear([gate, up])
        self._down = down
        self._is_gelu = activation == "gelu"

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self._down(gated(self._gate_up(hidden), gelu=self._is_gelu))
        return output


class GpuAttention(nn.Module):
    """Query, key and value by one product, rotated in place and written to the pool by one launch."""

    def __init__(self, module: nn.Module, options: AttentionOptions, norms: HeadNorms | None) -> None:
        super().__init__()
        projections: list[nn.Linear] = [getattr(module, name) for name in ("q_proj", "k_proj", "v_proj")]
        self.layer_idx: int = module.layer_idx  # type: ignore[assignment]
        self.head_dim: int = module.head_dim  # type: ignore[assignment]
        self.hidden_size = projections[0].in_features
        self._num_query, self._num_kv, _ = (one.out_features // self.head_dim for one in projections)
        self._projections = JoinedLinear(projections)
        self._output: nn.Module = module.o_proj  # type: ignore[assignment]
        self._options = options
        self._norms = norms

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        *_: Any,
        attention_inputs: AttentionInputs,
        **__: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [1, T, H], cosines and sines [1, T, at most D] -> [1, T, H]."""
        num_tokens = hidden_states.shape[1]
        heads = self._projections(hidden_states[0]).view(num_tokens, -1, self.head_dim)
        cosines, sines = (angles.expand(1, num_tokens, -1)[0] for angles in position_embeddings)
        backend = attention_inputs.backend
        layer = self.layer_idx - attention_inputs.first_layer
        attend = getattr(backend, "attend", None)  # of a backend that finds what is written to the pool
        write_to = None if attend is None else (attention_inputs, layer)
        rotate(heads, cosines, sines, self._num_query, self._num_kv, self._norms, write_to)
        query = heads[:, : self._num_query]
        if attend is not None:
            attended = attend(attention_inputs, layer, query, self._options)
        else:
            num_rotated = self._num_query + self._num_kv
            key, value = heads[:, self._num_query : num_rotated], heads[:, num_rotated:]
            attended = backend.forward(attention_inputs, layer, query, key, value, self._options)
        return self._output(attended.reshape(1, num_tokens, -1)), None


class GpuLayer(nn.Module):
    """A decoder layer of norm, attention, norm and MLP, where each sum is taken together with the norm behind it.

    following: the norm of what comes after the layer, if that is on this stage.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.input_layernorm: GpuRmsNorm = layer.input_layernorm  # type: ignore[assignment]
        self.self_attn: GpuAttention = layer.self_attn  # type: ignore[assignment]
        self.post_attention_layernorm: GpuRmsNorm = layer.post_attention_layernorm  # type: ignore[assignment]
        self.mlp: nn.Module = layer.mlp  # type: ignore[assignment]
        self._following: list[GpuRmsNorm] = []  # in a list, so that it is not a module of this one too
        for name in ("attention_type", "layer_type"):  # read by the model's own loop over its layers
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def follow_with(self, norm: GpuRmsNorm) -> None:
        self._following = [norm]

    def forward(
        self,
        hidden_states: Tensor,
        *_: Any,
        position_embeddings: tuple[Tensor, Tensor],
        attention_inputs: AttentionInputs,
        **__: Any,
    ) -> Tensor:
        attended, _nothing = self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings, attention_inputs=attention_inputs
        )
        normed, summed = self.post_attention_layernorm.add(attended, hidden_states)
        output: Tensor = self.mlp(normed)
        return self._following[0].add_ahead(output, summed) if self._following else torch.add(output, summed)
