"""Completions read on behind their prompts, whatever the tokenizer does at the start of a text."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from batchpipe.sample.stop import StopStrings
from batchpipe.sample.text import CompletionTexts

WORDS = "The capital of France is Paris , France and Paris again"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """As SentencePiece: a space is part of the word behind it, and the first one of a text is dropped."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", *bytes_], show_progress=False)
    tokenizer.train_from_iterator([WORDS] * 5, trainer)
    return tokenizer


@pytest.fixture
def texts(tokenizer: Tokenizer) -> CompletionTexts:
    def decode_batch(token_ids: Sequence[Sequence[int]], *, skip_special_tokens: bool = True) -> list[str]:
        return list(tokenizer.decode_batch([list(ids) for ids in token_ids], skip_special_tokens=skip_special_tokens))

    return CompletionTexts(decode_batch, ["<s>"])


@pytest.mark.parametrize("split", range(1, 11))
def test_the_first_space_is_kept(tokenizer: Tokenizer, texts: CompletionTexts, split: int) -> None:
    ids = tokenizer.encode(WORDS).ids
    words = WORDS.split(" ")
    prompt = tokenizer.encode(" ".join(words[:split])).ids
    [text] = texts.texts([prompt], [ids[len(prompt) :]], keep=False)
    assert " ".join(words[:split]) + text == WORDS


def test_many_are_decoded_at_once_each_behind_its_own_prompt(tokenizer: Tokenizer, texts: CompletionTexts) -> None:
    ids = tokenizer.encode("The capital").ids
    found = texts.texts([[], ids, [1]], [ids, ids[1:], []], keep=False)
    assert found == ["The capital", tokenizer.decode([*ids, *ids[1:]])[len("The capital") :], ""]


def test_a_character_that_the_prompt_begins_is_the_completions(tokenizer: Tokenizer, texts: CompletionTexts) -> None:
    euro = [tokenizer.encode(f"<0x{byte:02X}>").ids[0] for byte in "\u20ac".encode()]
    [text] = texts.texts([euro[:2]], [euro[2:]], keep=True)  # bytes are special tokens here
    assert text == "\u20ac"


def test_a_stop_string_may_begin_with_the_first_space(tokenizer: Tokenizer, texts: CompletionTexts) -> None:
    prompt, whole = tokenizer.encode("The capital of").ids, tokenizer.encode("The capital of France is").ids
    stops = StopStrings(texts.decoder(prompt, keep=False), (" France",), 0)
    assert [found for token_id in whole[len(prompt) :] if (found := stops.feed(token_id)) is not None][:1] == [0]


def test_special_tokens_in_texts(texts: CompletionTexts) -> None:
    assert texts.has_special(["x", "a<s>"]) and not texts.has_special(["x", "s"])
    assert texts.without_special("<s>a<s>") == "a"
    assert not CompletionTexts(lambda ids, *, skip_special_tokens=True: [""], []).has_special(["<s>"])
    assert CompletionTexts(lambda ids, *, skip_special_tokens=True: [""], []).without_special("<s>") == "<s>"
