"""Sizes of models that published results are about, from their config.json."""

from __future__ import annotations

from batchpipe.cost.model_shape import ModelShape


def transformer(
    name: str,
    *,
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
    vocabulary_size: int,
    num_experts: int = 1,
    num_experts_per_token: int = 1,
) -> ModelShape:
    """A Llama-like model in 16 bits: gated feed-forward network, heads that together are as wide as the model."""
    head_dim = hidden_size // num_heads
    attention = 2 * hidden_size * (num_heads + num_kv_heads) * head_dim
    expert = 3 * hidden_size * intermediate_size
    return ModelShape(
        name=name,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden_size=hidden_size,
        vocabulary_size=vocabulary_size,
        dtype="bfloat16",
        layer_flops=(2.0 * (attention + num_experts_per_token * expert),) * num_layers,
        layer_weight_bytes=(2 * (attention + num_experts * expert),) * num_layers,
    )


KNOWN_SHAPES = {
    geometry.name: geometry
    for geometry in (
        transformer(
            "Llama-2-13B",
            num_layers=40,
            hidden_size=5120,
            num_heads=40,
            num_kv_heads=40,
            intermediate_size=13824,
            vocabulary_size=32000,
        ),
        transformer(
            "Llama-2-70B",
            num_layers=80,
            hidden_size=8192,
            num_heads=64,
            num_kv_heads=8,
            intermediate_size=28672,
            vocabulary_size=32000,
        ),
        transformer(
            "Llama-3.1-8B",
            num_layers=32,
            hidden_size=4096,
            num_heads=32,
            num_kv_heads=8,
            intermediate_size=14336,
            vocabulary_size=128256,
        ),
        transformer(
            "Qwen2.5-32B",
            num_layers=64,
            hidden_size=5120,
            num_heads=40,
            num_kv_heads=8,
            intermediate_size=27648,
            vocabulary_size=152064,
        ),
        transformer(
            "Mixtral-8x7B",
            num_layers=32,
            hidden_size=4096,
            num_heads=32,
            num_kv_heads=8,
            intermediate_size=14336,
            vocabulary_size=32000,
            num_experts=8,
            num_experts_per_token=2,
        ),
    )
}
