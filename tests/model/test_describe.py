from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from batchpipe.errors import JobError, ModelError
from batchpipe.job.spec import ModelSpec
from batchpipe.model.architectures import SUPPORTED
from batchpipe.model.checkpoint import Tensor, stored_dtype, unpacked_shapes
from batchpipe.model.describe import describe_model
from batchpipe.model.resolve import resolve_model
from batchpipe.model.tokenizer import check_vocabulary, load_tokenizer
from tests.tiny_models import ARCHITECTURES, MORE_ARCHITECTURES, tiny_model

LLAMA_70B = Path(__file__).parents[2] / "benchmarks" / "models" / "Llama-2-70B"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama"), tmp_path / "model"))


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_every_supported_model_type_is_tested() -> None:
    assert {make_config().model_type for make_config in (ARCHITECTURES | MORE_ARCHITECTURES).values()} == set(SUPPORTED)


@pytest.mark.parametrize("architecture", ["llama", "llama_tied", "qwen3_moe", "gpt_oss"])
def test_weight_bytes_are_those_of_the_loaded_model(architecture: str) -> None:
    info = describe_model(tiny_model(architecture))
    model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture))
    assert info.weight_bytes == sum(parameter.numel() * 4 for parameter in model.parameters())
    layers = [sum(p.numel() * 4 for p in layer.parameters()) for layer in model.model.layers]
    assert list(info.layer_weight_bytes) == layers


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_without_weights_a_model_is_what_its_configuration_makes(architecture: str, tmp_path: Path) -> None:
    no_weights = shutil.ignore_patterns("*.safetensors")
    folder = Path(shutil.copytree(tiny_model(architecture), tmp_path / architecture, ignore=no_weights))
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        describe_model(folder)
    found = describe_model(folder, needs_weights=False)
    assert replace(found, folder=tiny_model(architecture)) == describe_model(tiny_model(architecture))


def test_a_published_configuration_has_its_published_size() -> None:
    info = describe_model(LLAMA_70B, "bfloat16", needs_weights=False)
    assert info.weight_bytes == pytest.approx(2 * 68.98e9, rel=1e-3)
    assert (info.num_layers, info.num_kv_heads, info.head_dim, info.max_context_tokens) == (80, 8, 128, 4096)
    assert info.kv_bytes_per_token == 327_680
    assert describe_model(LLAMA_70B, device="cuda", needs_weights=False).dtype == "float16"


def test_pickled_weights_are_refused_with_a_configuration_too(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only pickled weights"):
        describe_model(folder, needs_weights=False)


def test_a_configuration_that_makes_no_model_is_told(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    change_config(folder, hidden_act="no such function")
    with pytest.raises(ModelError, match=r"config\.json makes no model.*no such function"):
        describe_model(folder, needs_weights=False)


def test_geometry() -> None:
    info = describe_model(tiny_model("qwen3"), "bfloat16")
    assert (info.num_layers, info.num_heads, info.num_kv_heads, info.head_dim) == (4, 4, 2, 16)
    assert (info.hidden_size, info.vocabulary_size, info.max_context_tokens) == (48, 336, 256)
    assert (info.architecture, info.eos_token_ids, info.dtype) == ("Qwen3ForCausalLM", (2,), "bfloat16")
    assert info.kv_bytes_per_token_layer == 2 * 2 * 16 * 2


def test_costs_count_the_experts_that_a_token_visits() -> None:
    info = describe_model(tiny_model("mixtral"))
    attention, expert, router_and_norms = 48 * 12 * (4 + 4 + 2 + 2), 3 * 48 * 64, 48 * 4 + 2 * 48
    assert info.layer_flops == (2.0 * (attention + 2 * expert + router_and_norms),) * 4
    assert info.head_flops == 2.0 * 48 * 336


@pytest.mark.parametrize(
    ("stored", "asked", "device", "expected"),
    [
        ("float32", "auto", "cpu", "float32"),
        ("bfloat16", "auto", "cuda", "bfloat16"),
        ("float16", "auto", "cuda", "float16"),
        ("float16", "auto", "cpu", "bfloat16"),
        ("float16", "float16", "cpu", "float16"),
        ("float32", "bfloat16", "cpu", "bfloat16"),
    ],
)
def test_dtype(folder: Path, stored: str, asked: str, device: str, expected: str) -> None:
    """The weights say in which type they are, whatever config.json says."""
    tensors = {
        name: tensor.to(getattr(torch, stored)) for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    change_config(folder, dtype="float64")
    assert describe_model(folder, asked, device=device).dtype == expected


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ({"rope_type": "dynamic", "factor": 4.0}, 256),
        ({"rope_type": "linear", "factor": 4.0}, 1024),
    ],
)
def test_longest_context(folder: Path, rope: dict[str, Any], expected: int) -> None:
    change_config(folder, rope_parameters={"rope_theta": 10000.0, **rope})
    assert describe_model(folder).max_context_tokens == expected


def test_the_job_may_set_the_longest_context(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert describe_model(folder, context_tokens=100).max_context_tokens == 100
    assert not caplog.messages
    assert describe_model(folder, context_tokens=300).max_context_tokens == 300
    assert caplog.messages == [
        "model.max_context_tokens: 300 is more than the 256 tokens that the model names; longer rows may be poor"
    ]
    change_config(folder, rope_parameters={"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0})
    with pytest.raises(JobError, match="300 is more than 256, beyond which the model's dynamic scaling"):
        describe_model(folder, context_tokens=300)


def test_scaling_of_each_kind_of_layer_names_the_length_after_it(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("gemma3"), tmp_path / "model"))
    plain = {"rope_type": "default", "rope_theta": 1e4}
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}
    change_config(folder, rope_parameters={"sliding_attention": plain, "full_attention": linear})
    assert describe_model(folder).max_context_tokens == 256


def test_longrope_is_held_to_the_trained_length(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("phi3"), tmp_path / "model"))
    factors = {"short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **factors}
    change_config(folder, rope_parameters=rope, original_max_position_embeddings=64)
    assert AutoConfig.from_pretrained(folder).max_position_embeddings == 256
    assert describe_model(folder).max_context_tokens == 64


def test_end_tokens_of_the_generation_config_win(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert describe_model(folder).eos_token_ids == (7, 9)
    (folder / "generation_config.json").write_text("{}")
    assert describe_model(folder).eos_token_ids == (2,)


@pytest.mark.parametrize(("stated", "token_ids"), [(None, ()), (3, (3,))])
def test_a_config_may_name_no_end_token(folder: Path, stated: int | None, token_ids: tuple[int, ...]) -> None:
    change_config(folder, eos_token_id=None)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
    assert describe_model(folder).eos_token_ids == token_ids


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="has no config.json"):
        describe_model(folder)


@pytest.mark.parametrize("changes", [{"hidden_size": "many"}, {"num_attention_heads": 0}])
def test_a_config_that_makes_no_sense(folder: Path, changes: dict[str, Any]) -> None:
    change_config(folder, **changes)
    with pytest.raises(ModelError, match=r"config\.json is not understood"):
        describe_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["JambaForCausalLM"], "model_type": "jamba", "mamba_d_state": 16}, "JambaFor.*state-space"),
        ({"architectures": ["DeepseekV3ForCausalLM"], "kv_lora_rank": 512}, "DeepseekV3.*multi-head latent attention"),
        ({"architectures": ["Llama4ForCausalLM"], "attention_chunk_size": 8192}, "Llama4.*chunked attention"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "T5For.*an encoder"),
        ({"vision_config": {"hidden_size": 3}}, "a vision part"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "layers of type linear_attention"),
        ({"architectures": ["OwnForCausalLM"], "model_type": "own"}, "OwnForCausalLM.*not supported.*llama"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, "model.trust_remote_code to true"),
    ],
)
def test_what_cannot_run_is_refused_by_name(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(ModelError, match=message):
        describe_model(folder)


def test_a_shard_is_missing(folder: Path) -> None:
    with safe_open(folder / "model.safetensors", "pt") as file:
        weight_map = dict.fromkeys(file.keys(), "model-00001-of-00002.safetensors")
    weight_map["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"lacks 1 of 2 weight files.*model-00002-of-00002\.safetensors"):
        describe_model(folder)


def test_only_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="only pickled weights"):
        describe_model(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="has no model.safetensors"):
        describe_model(folder)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ((1 << 60).to_bytes(8, "little"), "header claims 1152921504606846976 bytes"),
        ((8).to_bytes(8, "little") + b"not json", "is damaged"),
        ((9).to_bytes(8, "little") + b'{"a": []}', "is damaged"),
        (b"123", "header claims"),
    ],
)
def test_a_damaged_header(folder: Path, header: bytes, message: str) -> None:
    (folder / "model.safetensors").write_bytes(header)
    with pytest.raises(ModelError, match=message):
        describe_model(folder)


def test_a_file_cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelError, match="is cut short"):
        describe_model(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{", r"config\.json cannot be read"),
        ("config.json", "[1]", r"config\.json is not a JSON object"),
        ("generation_config.json", "eos", r"generation_config\.json cannot be read"),
        ("model.safetensors.index.json", "7", r"index\.json is not a JSON object"),
    ],
)
def test_a_damaged_file_is_named(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(ModelError, match=rf"^model\.name: .*{message}"):
        describe_model(folder)


def test_a_tokenizer_may_have_added_tokens_beyond_the_embedding(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 336, "content": "<image>"})
    path.write_text(json.dumps(tokenizer))
    check_vocabulary(load_tokenizer(folder), 336, folder)


def test_packed_experts_have_the_size_of_their_numbers() -> None:
    packed = {
        "e.gate_blocks": Tensor("U8", (4, 96, 2, 16)),  # experts, outputs, blocks of 32 numbers, bytes
        "e.gate_scales": Tensor("U8", (4, 96, 2)),
        "e.gate_bias": Tensor("BF16", (4, 96)),
        "own_scales": Tensor("F32", (7,)),
    }
    assert unpacked_shapes(packed) == {"e.gate": (4, 96, 64), "e.gate_bias": (4, 96), "own_scales": (7,)}
    assert stored_dtype(packed) == "bfloat16"
    assert stored_dtype({"w": Tensor("U8", (4,))}) is None


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_quantised_weights_are_refused_with_what_to_do(folder: Path, method: str) -> None:
    change_config(folder, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ModelError, match=rf"are quantised \({method}\), which cannot run; name the model"):
        describe_model(folder)


def test_an_adapter_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="holds an adapter of org/base; merge it"):
        resolve_model(ModelSpec(name=str(tmp_path)))


def test_an_index_must_map_tensors_to_files(folder: Path) -> None:
    wrong: tuple[object, ...] = ([], {"w": 1})
    for weight_map in wrong:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ModelError, match="weight_map of .* does not map tensors to files"):
            describe_model(folder)


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"token id \d+ and the model's embedding has 300 rows"):
        check_vocabulary(load_tokenizer(folder), 300, folder)
