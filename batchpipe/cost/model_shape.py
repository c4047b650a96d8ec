"""A model's size, as far as time depends on it."""

from __future__ import annotations

from dataclasses import dataclass

from batchpipe.kv.layout import ITEM_BYTES, KvLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """One decoder. Floating point operations are for one token, without attention over its context."""

    name: str  # as the job calls it
    dtype: str  # of weights, activations, keys and values: bfloat16 | float16 | float32
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocabulary_size: int
    layer_flops: tuple[float, ...]
    layer_weight_bytes: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def kv_bytes_per_token_layer(self) -> int:
        return KvLayout.of(self).bytes_per_token_layer

    @property
    def kv_bytes_per_token(self) -> int:
        return self.num_layers * self.kv_bytes_per_token_layer

    @property
    def hidden_bytes_per_token(self) -> int:
        return self.hidden_size * self.item_bytes

    @property
    def head_weight_bytes(self) -> int:
        return self.hidden_size * self.vocabulary_size * self.item_bytes

    @property
    def head_flops(self) -> float:
        return 2.0 * self.hidden_size * self.vocabulary_size
