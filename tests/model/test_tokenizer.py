"""The tokenizer says what transformers says; a folder without a usable one is a ModelError."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from batchpipe.errors import ModelError
from batchpipe.model.tokenizer import load_tokenizer
from tests.tiny_tokenizer import build_tiny_tokenizer

TEXTS = ["", " ", "hello world", "  the\n\nquick ", "<|start|>user<|end|>", "\u00e9 \U0001f600 \u0627\u0644", "x" * 500]


@pytest.mark.parametrize("adds_begin_token", [False, True])
@pytest.mark.parametrize("add_special_tokens", [False, True])
def test_encodes_as_transformers(tmp_path: Path, adds_begin_token: bool, add_special_tokens: bool) -> None:
    folder = build_tiny_tokenizer(tmp_path, adds_begin_token=adds_begin_token)
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder).encode_batch(TEXTS, add_special_tokens=add_special_tokens)
    assert ours == theirs(TEXTS, add_special_tokens=add_special_tokens)["input_ids"]


def test_decodes_as_transformers(tmp_path: Path) -> None:
    folder = build_tiny_tokenizer(tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    token_ids = ours.encode_batch(TEXTS, add_special_tokens=False)
    assert ours.decode_batch(token_ids) == theirs.batch_decode(token_ids, skip_special_tokens=True)
    for ids in token_ids:
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_what_is_put_before_a_text(tmp_path: Path) -> None:
    plain = build_tiny_tokenizer(tmp_path / "plain")
    assert load_tokenizer(plain).beginning_token_ids() == []
    assert load_tokenizer(build_tiny_tokenizer(tmp_path / "one", adds_begin_token=True)).beginning_token_ids() == [0]
    content = json.loads((tmp_path / "one" / "tokenizer.json").read_text())
    begin, text = content["post_processor"]["single"]
    for pieces, found in (([begin, begin, text, begin], [0, 0]), ([text, begin], [])):
        content["post_processor"]["single"] = pieces
        (plain / "tokenizer.json").write_text(json.dumps(content))
        assert load_tokenizer(plain).beginning_token_ids() == found


def test_truncation_and_padding_of_training_are_not_kept(tmp_path: Path) -> None:
    file = build_tiny_tokenizer(tmp_path) / "tokenizer.json"
    content = json.loads(file.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|begin|>",
    }  # fmt: skip
    file.write_text(json.dumps(content))
    short, long = load_tokenizer(tmp_path).encode_batch(["a", "abcdefghijkl"], add_special_tokens=False)
    assert (len(short), len(long) > 4) == (1, True)


def test_has_chat_template(tmp_path: Path) -> None:
    assert load_tokenizer(build_tiny_tokenizer(tmp_path / "a")).has_chat_template
    assert not load_tokenizer(build_tiny_tokenizer(tmp_path / "b", chat_template=None)).has_chat_template


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="holds no tokenizer files"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", ""])
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    (build_tiny_tokenizer(tmp_path) / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="the tokenizer of .* cannot be loaded"):
        load_tokenizer(tmp_path)
