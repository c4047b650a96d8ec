"""Fused models against themselves unfused, with float32 as the judge of both."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from batchpipe.attention.reference import ReferenceAttention
from batchpipe.attention.step_inputs import StepInputs
from batchpipe.kv.pool import KvPool
from batchpipe.model.describe import describe_model
from batchpipe.model.fused.cpu_modules import FusedAttention, FusedLayer, FusedMlp, FusedRmsNorm, PackedLinear
from batchpipe.model.fused.fuse import fuse
from batchpipe.model.load import StageModel, load_stage
from batchpipe.native.build import load_kernels
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C kernels here")
LENGTHS = np.array([9, 14], np.int32)


class TorchProducts:
    """oneDNN's products with what follows them, by torch, for processors that oneDNN has no bfloat16 for."""

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, name: str, *_: object) -> Tensor:
        activations: dict[str, Callable[[Tensor], Tensor]] = {
            "none": lambda x: x,
            "swish": functional.silu,
            "gelu": lambda x: functional.gelu(x, approximate="tanh"),
        }
        return activations[name](_product(hidden, weight, bias)).bfloat16()

    def binary(self, hidden: Tensor, other: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
        product = _product(hidden, weight, bias)
        return (product * other.float() if name == "mul" else product + other.float()).bfloat16()


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(hidden.float(), weight.float(), None if bias is None else bias.float())


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> None:
    onednn = torch.ops.mkldnn
    if onednn._is_mkldnn_bf16_supported():
        return
    monkeypatch.setattr(onednn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(onednn, "_reorder_linear_weight", lambda weight, rows: weight)
    monkeypatch.setattr(onednn, "_linear_pointwise", TorchProducts())


def load(folder: Path, dtype: torch.dtype) -> StageModel:
    num_layers = describe_model(folder, "float32").num_layers
    return load_stage(folder, range(num_layers), is_first=True, is_last=True, dtype=dtype)


def logits(stage: StageModel, folder: Path, dtype: torch.dtype) -> Tensor:
    info = describe_model(folder, "float32")
    pool = KvPool(4, info.num_layers, info.num_kv_heads, 16, info.head_dim, dtype)
    inputs = StepInputs(pool).fill(LENGTHS, 0 * LENGTHS, np.array([[1], [3]], np.int32), backend=ReferenceAttention())
    token_ids = torch.arange(inputs.num_tokens) * 7 % 250
    output: Tensor = stage(inputs, token_ids, inputs.positions, torch.arange(inputs.num_tokens))
    return output.float()


def kinds(stage: StageModel) -> set[type]:
    return {type(module) for module in stage.modules()} & (ALL | {FusedLayer})


ALL = {FusedAttention, FusedMlp, FusedRmsNorm, PackedLinear}


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("llama", ALL | {FusedLayer}),
        ("llama_tied", ALL | {FusedLayer}),
        ("mistral", ALL | {FusedLayer}),
        ("qwen2", ALL | {FusedLayer}),
        ("gemma2", ALL),
        ("smollm3", ALL | {FusedLayer}),
        ("qwen3", ALL - {FusedAttention}),  # norms on query and key
        ("gpt_oss", {FusedRmsNorm, PackedLinear}),
        ("olmo", (ALL | {FusedLayer}) - {FusedRmsNorm}),
        ("glm4_moe", ALL | {FusedLayer}),  # turns a part of each head
        ("cohere2", {FusedMlp, PackedLinear}),
        ("phi3", {FusedRmsNorm, PackedLinear}),
    ],
)
def test_fused_is_as_near_to_float32_as_unfused(architecture: str, expected: set[type]) -> None:
    folder = tiny_model(architecture)
    exact = logits(load(folder, torch.float32), folder, torch.float32)
    stage = load(folder, torch.bfloat16)
    unfused = logits(stage, folder, torch.bfloat16)
    assert fuse(stage, torch.bfloat16)
    fused = logits(stage, folder, torch.bfloat16)
    assert kinds(stage) == expected
    # The median over tokens: a rounding that sends one token to another expert says nothing.
    assert (fused - exact).norm(dim=-1).median() < 1.5 * (unfused - exact).norm(dim=-1).median()


def test_layers_without_rotation_keep_their_attention() -> None:
    stage = load(tiny_model("smollm3"), torch.bfloat16)
    fuse(stage, torch.bfloat16)
    rotated = [type(layer.self_attn) is FusedAttention for layer in stage.model.base_model.layers]
    assert rotated == [bool(rotates) for rotates in stage.model.config.no_rope_layers]
    assert sorted(set(rotated)) == [False, True]


def test_float32_is_left_alone() -> None:
    stage = load(tiny_model("llama"), torch.float32)
    assert fuse(stage, torch.float32) == []
    assert not kinds(stage)


def test_a_tied_head_is_packed_beside_its_embedding() -> None:
    stage = load(tiny_model("llama_tied"), torch.bfloat16)
    embedding = stage.model.base_model.embed_tokens.weight.clone()
    hidden = torch.randn(3, embedding.shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = stage.model.lm_head(hidden)
    fuse(stage, torch.bfloat16)
    assert type(stage.model.lm_head) is PackedLinear
    assert torch.equal(stage.model.base_model.embed_tokens.weight, embedding)
    torch.testing.assert_close(stage.model.lm_head(hidden), expected)


class _ClippedMlp(nn.Module):
    """Looks like the common one and is not."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(32, 32).bfloat16() for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.act_fn(self.gate_proj(hidden)).clamp(max=0.1) * self.up_proj(hidden))
        return output


def test_what_computes_something_else_stays() -> None:
    model = nn.Sequential(_ClippedMlp())
    torch.manual_seed(0)
    assert fuse(model, torch.bfloat16) == ["0.gate_proj", "0.up_proj", "0.down_proj"]
    assert type(model[0]) is _ClippedMlp
