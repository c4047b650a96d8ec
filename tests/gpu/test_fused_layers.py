"""Models with the GPU's stand-ins against themselves without, with float32 as the judge of both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.gpu.interpreter import DEVICE  # isort: skip
from batchpipe.attention.base import AttentionInputs
from batchpipe.attention.device_inputs import DeviceStepInputs
from batchpipe.attention.reference import ReferenceAttention
from batchpipe.attention.step_inputs import StepInputs
from batchpipe.attention.triton_attention import TILE_QUERIES, TritonAttention
from batchpipe.kv.pool import KvPool
from batchpipe.model.describe import describe_model
from batchpipe.model.fused.gpu import fuse_on_gpu
from batchpipe.model.fused.gpu_modules import GpuAttention, GpuLayer, GpuMlp, GpuRmsNorm
from batchpipe.model.load import StageModel, load_stage
from tests.tiny_models import tiny_model

LENGTHS = np.array([9, 14], np.int32)
TABLES = np.array([[1], [3]], np.int32)
ALL = {GpuAttention, GpuLayer, GpuMlp, GpuRmsNorm}


def load(folder: Path, dtype: torch.dtype) -> StageModel:
    num_layers = describe_model(folder, "float32").num_layers
    return load_stage(folder, range(num_layers), is_first=True, is_last=True, dtype=dtype, device=str(DEVICE))


def logits(stage: StageModel, folder: Path, dtype: torch.dtype, *, by_triton: bool) -> Tensor:
    info = describe_model(folder, "float32")
    pool = KvPool(4, info.num_layers, info.num_kv_heads, 16, info.head_dim, dtype, DEVICE)
    num_tokens = int(LENGTHS.sum())
    token_ids = torch.arange(num_tokens, device=DEVICE) * 7 % 250
    positions = torch.cat([torch.arange(length, device=DEVICE) for length in LENGTHS.tolist()])
    if by_triton:
        step_inputs = DeviceStepInputs(DEVICE, 16, max_tokens=64, max_sequences=4, tile_queries=TILE_QUERIES)
        no_tokens, samples = np.zeros(num_tokens, np.int32), np.ones(2, np.bool_)
        at = step_inputs.fill(no_tokens, LENGTHS, 0 * LENGTHS, TABLES, samples)
        inputs = AttentionInputs.of_device(at, pool, TritonAttention(), 0)
    else:
        inputs = StepInputs(pool).fill(LENGTHS, 0 * LENGTHS, TABLES, backend=ReferenceAttention())
    output: Tensor = stage(inputs, token_ids, positions, torch.arange(num_tokens, device=DEVICE))
    return output.float()


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("llama", ALL),
        ("qwen3", ALL),  # norms of query and key heads
        ("gemma2", ALL - {GpuLayer}),  # four norms a layer, gelu, soft caps
        ("glm4_moe", ALL),  # turns a part of each head
    ],
)
def test_fused_is_as_near_to_float32_as_unfused(architecture: str, expected: set[type]) -> None:
    folder = tiny_model(architecture)
    with torch.inference_mode():
        exact = logits(load(folder, torch.float32), folder, torch.float32, by_triton=False)
        stage = load(folder, torch.float16)
        unfused = logits(stage, folder, torch.float16, by_triton=False)
        assert fuse_on_gpu(stage)
        by_triton = logits(stage, folder, torch.float16, by_triton=True)
        by_reference = logits(stage, folder, torch.float16, by_triton=False)
    assert {type(module) for module in stage.modules()} & ALL == expected
    # The median over tokens: a rounding that sends one token to another expert says nothing.
    error = (unfused - exact).norm(dim=-1).median()
    assert (by_triton - exact).norm(dim=-1).median() < 1.5 * error
    assert (by_reference - exact).norm(dim=-1).median() < 1.5 * error


def test_every_sum_is_taken_with_the_norm_behind_it() -> None:
    stage = load(tiny_model("llama"), torch.float16)
    with torch.inference_mode():
        fuse_on_gpu(stage)
    backbone = stage.model.base_model
    following = [layer._following[0] for layer in backbone.layers]
    assert following == [*(layer.input_layernorm for layer in backbone.layers[1:]), backbone.norm]
