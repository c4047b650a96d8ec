"""Faster stand-ins for the common parts of a decoder layer: bfloat16, CPU, inference only.

Each takes over the weights of the module it stands in for and computes the same to bfloat16's rounding.
H hidden size, T tokens, D head_dim, Hq query heads, Hkv KV heads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from batchpipe.attention.base import AttentionInputs, AttentionOptions

# The block layout of a packed weight is chosen for about this many rows; others are nearly as fast with it.
PACKED_FOR_ROWS = 256


class PackedLinear(nn.Module):
    """One or more linear layers of the same input as one, its weight in the layout that oneDNN computes with."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        super().__init__()
        weight = torch.cat([linear.weight for linear in linears]) if len(linears) > 1 else linears[0].weight
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_FOR_ROWS)
        self._bias = _joined_bias(linears)

    def forward(self, hidden: Tensor, activation: str = "none") -> Tensor:
        """[..., H] -> [..., outputs]; `activation` is a name of oneDNN's: none, swish or gelu (by tanh)."""
        algorithm = "tanh" if activation == "gelu" else ""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            hidden, self._weight, self._bias, activation, [], algorithm
        )
        return product

    def times(self, hidden: Tensor, factor: Tensor) -> Tensor:
        """The layer's outputs, each multiplied by its number of `factor`, before they are rounded."""
        return self._with(hidden, factor, "mul")

    def plus(self, hidden: Tensor, summand: Tensor) -> Tensor:
        """The layer's outputs, each added to its number of `summand`, before they are rounded."""
        return self._with(hidden, summand, "add")

    def _with(self, hidden: Tensor, other: Tensor, operation: str) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise.binary(hidden, other, self._weight, self._bias, operation)
        return product


def _joined_bias(linears: Sequence[nn.Linear]) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    return torch.cat(
        [
            linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
            for linear in linears
        ]
    )


class FusedRmsNorm(nn.Module):
    """Root mean square normalisation by a float32 weight, with a rounding before it where `rounded_first`."""

    def __init__(self, kernels: ctypes.CDLL, weight: Tensor, epsilon: float, *, rounded_first: bool) -> None:
        super().__init__()
        self._function = kernels.batchpipe_rms_norm
        self._function.argtypes = [c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_float, c_int64, c_int64]
        self._function.restype = None
        self._weight = weight.detach().float().contiguous()
        self._epsilon = epsilon
        self._rounded_first = rounded_first

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden.contiguous()
        output = torch.empty_like(hidden)
        width = hidden.shape[-1]
        self._function(
            hidden.data_ptr(),
            self._weight.data_ptr(),
            output.data_ptr(),
            hidden.numel() // width,
            width,
            self._epsilon,
            self._rounded_first,
            torch.get_num_threads(),
        )
        return output


class FusedMlp(nn.Module):
    """down(activation(gate(x)) * up(x)), with the activation and the product taken inside the matrix products."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, *, activation: str) -> None:
        super().__init__()
        self.in_features = gate.in_features
        self._gate, self._up, self._down = PackedLinear([gate]), PackedLinear([up]), PackedLinear([down])
        self._activation = activation

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self._down(self._inner(hidden))
        return output

    def plus(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self._down.plus(self._inner(hidden), residual)

    def _inner(self, hidden: Tensor) -> Tensor:
        return self._up.times(hidden, self._gate(hidden, self._activation))


class FusedAttention(nn.Module):
    """Projections of query, key and value as one, rotated in place and handed to the attention backend as they lie."""

    def __init__(self, kernels: ctypes.CDLL, module: nn.Module, options: AttentionOptions) -> None:
        super().__init__()
        projections = [getattr(module, name) for name in ("q_proj", "k_proj", "v_proj")]
        self.layer_idx: int = module.layer_idx  # type: ignore[assignment]
        self.head_dim: int = module.head_dim  # type: ignore[assignment]
        self._num_heads, self._num_kv_heads, _ = (p.out_features // self.head_dim for p in projections)
        self._projections = PackedLinear(projections)
        self._output = PackedLinear([module.o_proj])  # type: ignore[list-item]
        self._options = options
        self._rotate = kernels.batchpipe_rotate
        self._rotate.argtypes = [c_void_p] * 3 + [c_int64] * 6
        self._rotate.restype = None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        *_: Any,
        attention_inputs: AttentionInputs,
        **__: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [1, T, H], cosines and sines [1, T, at most D] -> [1, T, H]. The other arguments are caches and
        masks, of which there are none.
        """
        return self._output(self._attend(hidden_states, position_embeddings, attention_inputs)), None

    def plus(
        self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], inputs: AttentionInputs, residual: Tensor
    ) -> Tensor:
        return self._output.plus(self._attend(hidden, position_embeddings, inputs), residual)

    def _attend(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_inputs: AttentionInputs
    ) -> Tensor:
        heads = self._projections(hidden_states)[0].view(len(hidden_states[0]), -1, self.head_dim)
        # Some models keep their angles in float32.
        cosines, sines = (angles.to(heads.dtype).contiguous() for angles in position_embeddings)
        assert cosines.shape == sines.shape and cosines.shape[:2] == (1, len(heads))
        assert cosines.shape[-1] <= self.head_dim
        num_rotated = self._num_heads + self._num_kv_heads
        self._rotate(
            heads.data_ptr(),
            cosines.data_ptr(),
            sines.data_ptr(),
            len(heads),
            num_rotated,
            self.head_dim,
            cosines.shape[-1],
            heads.stride(0),
            torch.get_num_threads(),
        )
        attended = attention_inputs.backend.forward(
            attention_inputs,
            self.layer_idx - attention_inputs.first_layer,
            heads[:, : self._num_heads],
            heads[:, self._num_heads : num_rotated],
            heads[:, num_rotated:],
            self._options,
        )
        return attended.view(1, len(heads), -1)


class FusedLayer(nn.Module):
    """A decoder layer of norm, attention, norm and MLP; what came in is added inside the last product of each half."""

    def __init__(self, layer: nn.Module, attention: FusedAttention, mlp: FusedMlp) -> None:
        super().__init__()
        self.input_layernorm: nn.Module = layer.input_layernorm  # type: ignore[assignment]
        self.self_attn = attention
        self.post_attention_layernorm: nn.Module = layer.post_attention_layernorm  # type: ignore[assignment]
        self.mlp = mlp
        for name in ("attention_type", "layer_type"):  # read by the model's own loop over its layers
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(
        self,
        hidden_states: Tensor,
        *_: Any,
        position_embeddings: tuple[Tensor, Tensor],
        attention_inputs: AttentionInputs,
        **__: Any,
    ) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        hidden = self.self_attn.plus(normed, position_embeddings, attention_inputs, hidden_states)
        return self.mlp.plus(self.post_attention_layernorm(hidden), hidden)
