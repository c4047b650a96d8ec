"""Stages of every architecture give, greedily and in float32, the tokens of transformers' own generate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from batchpipe.attention.reference import ReferenceAttention
from batchpipe.attention.step_inputs import StepInputs
from batchpipe.errors import ModelError
from batchpipe.kv.pool import KvPool
from batchpipe.model.describe import describe_model
from batchpipe.model.load import StageModel, load_stage
from batchpipe.model.partition import split_layers
from tests.tiny_models import ARCHITECTURES, tiny_model
from tests.transformers_tokens import greedy_tokens

NEW_TOKENS = 12
MAX_TOKENS = 64
PROMPTS = [[5, 9, 200], [17] * 21, [3], list(range(40, 54)), [250, 1, 250, 2, 250, 3]]


def load_stages(folder: Path, num_stages: int, dtype: torch.dtype = torch.float32) -> list[tuple[StageModel, range]]:
    info = describe_model(folder)
    return [
        (load_stage(folder, layers, is_first=i == 0, is_last=i == num_stages - 1, dtype=dtype), layers)
        for i, layers in enumerate(split_layers(info.layer_flops, info.head_flops, 0.0, num_stages))
    ]


class Pipeline:
    """Stages one after the other, with blocks handed out in a shuffled order."""

    def __init__(self, folder: Path, num_stages: int, block_tokens: int) -> None:
        info = describe_model(folder)
        self.stages = load_stages(folder, num_stages)
        blocks = -(-MAX_TOKENS // block_tokens)
        order = np.random.default_rng(1).permutation(len(PROMPTS) * blocks).astype(np.int32)
        self.tables = order.reshape(len(PROMPTS), blocks)
        self.pools = [
            KvPool(order.size, len(layers), info.num_kv_heads, block_tokens, info.head_dim, torch.float32)
            for _, layers in self.stages
        ]

    def step(self, sequences: list[int], new: list[list[int]], contexts: list[int]) -> list[int]:
        """The most likely next token after each sequence's new ones."""
        source = torch.tensor([token for tokens in new for token in tokens])
        for (stage, layers), pool in zip(self.stages, self.pools, strict=True):
            inputs = StepInputs(pool, first_layer=layers.start).fill(
                np.array([len(tokens) for tokens in new], np.int32),
                np.array(contexts, np.int32),
                self.tables[sequences],
                backend=ReferenceAttention(),
            )
            rows = inputs.query_starts[1:].long() - 1 if pool is self.pools[-1] else None
            source = stage(inputs, source, inputs.positions, rows)
        return source.argmax(-1).tolist()

    def generate(self, chunk_tokens: int) -> list[tuple[int, ...]]:
        """Every prompt in chunks, so that prefill and decode of different sequences share a step."""
        texts = [list(prompt) for prompt in PROMPTS]
        done = [0] * len(texts)
        while running := [i for i, text in enumerate(texts) if len(text) < len(PROMPTS[i]) + NEW_TOKENS]:
            new = [texts[i][done[i] : done[i] + chunk_tokens] for i in running]
            drawn = self.step(running, new, [done[i] for i in running])
            for i, tokens, token in zip(running, new, drawn, strict=True):
                done[i] += len(tokens)
                if done[i] == len(texts[i]):
                    texts[i].append(token)
        return [tuple(text[len(prompt) :]) for text, prompt in zip(texts, PROMPTS, strict=True)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_are_those_of_transformers(architecture: str) -> None:
    folder = tiny_model(architecture)
    expected = greedy_tokens(folder, PROMPTS, NEW_TOKENS)
    assert len({token for tokens in expected for token in tokens}) > NEW_TOKENS, "too dull to tell right from wrong"
    for num_stages, block_tokens, chunk_tokens in [(1, 16, MAX_TOKENS), (2, 1, 5), (3, 64, 3)]:
        assert Pipeline(folder, num_stages, block_tokens).generate(chunk_tokens) == expected, num_stages


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "qwen3_moe"])
def test_stages_share_the_weights_out_between_them(architecture: str) -> None:
    folder = tiny_model(architecture)
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    stages = load_stages(folder, 3)
    sizes = [sum(p.numel() for p in stage.parameters()) for stage, _ in stages]
    embedding = 336 * 48  # a tied one is on the first stage and on the last
    assert sum(sizes) == whole + (embedding if architecture == "llama_tied" else 0)
    assert all(0 < size < whole for size in sizes)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = copy_model(tmp_path, drop="model.layers.2.mlp.up_proj.weight")
    with pytest.raises(ModelError, match=r"lacks 1 tensors .* model\.layers\.2\.mlp\.up_proj\.weight"):
        load_stage(folder, range(2, 4), is_first=False, is_last=True, dtype=torch.float32)
    load_stage(folder, range(2), is_first=True, is_last=False, dtype=torch.float32)


def test_a_tensor_of_another_shape_is_an_error(tmp_path: Path) -> None:
    folder = copy_model(tmp_path, drop="model.layers.0.mlp.up_proj.weight", put=torch.zeros(3, 3))
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight .* \[3, 3\] .* \[64, 48\]"):
        load_stage(folder, range(2), is_first=True, is_last=False, dtype=torch.float32)


def copy_model(folder: Path, drop: str, put: torch.Tensor | None = None) -> Path:
    source = tiny_model("llama")
    for path in source.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    del tensors[drop]
    if put is not None:
        tensors[drop] = put
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
