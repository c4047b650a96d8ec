"""Types that are not on the tested list: run where a small model of them is equal in stages, else refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from batchpipe.errors import ModelError
from batchpipe.model.architectures import SUPPORTED, check_supported
from batchpipe.model.unlisted.self_check import check_unlisted
from batchpipe.model.unlisted.twin import save_twin, twin_changes
from tests.tiny_models import tiny_model

SHARED = {
    "vocab_size": 3000,
    "hidden_size": 64,
    "intermediate_size": 640,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def folder_of(model_type: str, folder: Path, **own: Any) -> Path:
    """A model's config.json alone."""
    shared = {} if model_type == "gpt_neo" else SHARED  # its number of layers follows from another setting
    CONFIG_MAPPING[model_type](**shared | own).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("model_type", ["granitemoe_swa", "minimax_m3_vl_text"])
def test_a_type_that_is_equal_runs(model_type: str, tmp_path: Path) -> None:
    assert model_type not in SUPPORTED
    folder = folder_of(model_type, tmp_path, head_dim=16)
    check_supported(json.loads((folder / "config.json").read_text()), trust_remote_code=False)
    check_unlisted(folder, trust_remote_code=False)


@pytest.mark.parametrize("model_type", ["diffllama", "nanochat"])
def test_a_type_that_computes_something_else_is_refused_by_name(model_type: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"'{model_type}' is not on the tested list, .* other logits in stages"):
        check_unlisted(folder_of(model_type, tmp_path), trust_remote_code=False)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("stablelm", "cannot be run in stages: TypeError"),
        ("bloom", "only plain decoders can run"),
        ("fuyu", "its configuration has no number of layers"),
        ("gpt_neo", "it cannot be loaded: its code has attention of its own"),
        ("blt", r"it cannot be made small: \d\.\d billion parameters are left"),
    ],
)
def test_a_type_that_is_built_otherwise_is_refused_by_name(model_type: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=reason):
        check_unlisted(folder_of(model_type, tmp_path), trust_remote_code=False)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phimoe", "gpt_oss"])
def test_tested_types_would_pass(architecture: str) -> None:
    check_unlisted(tiny_model(architecture), trust_remote_code=False)


def test_a_forgotten_window_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchpipe.model.load._take_windows_of_masks", lambda *_, **__: None)
    with pytest.raises(ModelError, match="other logits"):
        check_unlisted(tiny_model("phimoe"), trust_remote_code=False)


def test_a_twin_has_every_kind_of_layer_and_is_small(tmp_path: Path) -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    changes = twin_changes(
        {"num_hidden_layers": 24, "layer_types": kinds * 4, "num_local_experts": 128, "sliding_window": 4096,
         "intermediate_size": 14336, "use_sliding_window": True, "num_experts_per_tok": 8, "head_dim": 128}
    )  # fmt: skip
    assert changes["layer_types"] == kinds and changes["num_hidden_layers"] == 6
    assert (changes["num_local_experts"], changes["num_experts_per_tok"], changes["sliding_window"]) == (4, 2, 8)
    assert changes["intermediate_size"] == 64 and "head_dim" not in changes and "use_sliding_window" not in changes
    assert twin_changes({"num_hidden_layers": 3})["num_hidden_layers"] == 3
    before = torch.random.get_rng_state()
    save_twin(tiny_model("gemma2"), tmp_path, trust_remote_code=False)
    assert AutoConfig.from_pretrained(tmp_path).vocab_size == 512
    assert torch.equal(torch.random.get_rng_state(), before)


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnMlp(LlamaMLP):
    def forward(self, hidden):
        return super().forward(hidden) SOMETHING

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = OwnMlp(config)
"""


@pytest.mark.parametrize(("something", "is_equal"), [("", True), ("+ hidden.mean(1, keepdim=True)", False)])
def test_code_that_comes_with_a_model_is_tried_as_well(something: str, is_equal: bool, tmp_path: Path) -> None:
    """The second one mixes tokens outside of attention, and so sequences that share a step."""
    module = f"own_{is_equal}".lower()
    (tmp_path / f"{module}.py").write_text(OWN_CODE.replace("SOMETHING", something))
    auto_map = {"AutoConfig": f"{module}.OwnConfig", "AutoModelForCausalLM": f"{module}.OwnForCausalLM"}
    config = SHARED | {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if is_equal:
        check_unlisted(tmp_path, trust_remote_code=True)
    else:
        with pytest.raises(ModelError, match="'own' is not on the tested list, .* other logits in stages"):
            check_unlisted(tmp_path, trust_remote_code=True)
