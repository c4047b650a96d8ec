from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from batchpipe.sample.stop import StopStrings

Decode = Callable[[Sequence[int]], str]
SPECIAL = 256  # decodes to nothing
UNFINISHED = "\ufffd"


def decode_bytes(token_ids: Sequence[int]) -> str:
    """A tokenizer of 256 single bytes, token i being byte i, and one special token."""
    return bytes(token_id for token_id in token_ids if token_id != SPECIAL).decode("utf-8", "replace")


def stop_at(decode: Decode, token_ids: Sequence[int], stop: tuple[str, ...], min_tokens: int = 0) -> tuple[int, int]:
    """The number of tokens fed and the characters to keep when a stop string was found; (-1, -1) if none was."""
    stops = StopStrings(decode, stop, min_tokens)
    for num_fed, token_id in enumerate(token_ids, 1):
        length = stops.feed(token_id)
        if length is not None:
            return num_fed, length
    return -1, -1


def expected_stop_at(
    decode: Decode, token_ids: Sequence[int], stop: tuple[str, ...], min_tokens: int
) -> tuple[int, int]:
    """The same by looking at the whole text after every token."""
    exempt = len(decode(token_ids[:min_tokens]).rstrip(UNFINISHED))
    for num_fed in range(min_tokens + 1, len(token_ids) + 1):
        text = decode(token_ids[:num_fed]).rstrip(UNFINISHED)
        starts = [i for i in range(len(text)) for s in stop if text.startswith(s, i) and i + len(s) > exempt]
        if starts:
            return num_fed, min(starts)
    return -1, -1


def test_a_stop_string_over_several_tokens() -> None:
    assert stop_at(decode_bytes, b"one STOP two", ("STOP",)) == (8, 4)
    assert stop_at(decode_bytes, b"one STO two", ("STOP",)) == (-1, -1)


def test_an_emoji_over_several_tokens() -> None:
    text = "a😀b".encode()
    assert stop_at(decode_bytes, text, ("😀",)) == (5, 1)
    assert stop_at(decode_bytes, text, ("😀b",)) == (6, 1)
    assert stop_at(decode_bytes, text, ("b",)) == (6, 2)


def test_half_a_character_is_not_the_replacement_character() -> None:
    assert stop_at(decode_bytes, "ä".encode(), (UNFINISHED,)) == (-1, -1)


def test_what_stands_before_half_a_character_is_seen_at_once() -> None:
    pieces = [b"xSTOP" + "é".encode()[:1], "é".encode()[1:]]

    def decode(token_ids: Sequence[int]) -> str:
        return b"".join(pieces[i] for i in token_ids).decode("utf-8", "replace")

    assert stop_at(decode, [0, 1], ("STOP",)) == (1, 1)


def test_the_earliest_of_overlapping_stops_counts() -> None:
    assert stop_at(decode_bytes, b"xxabcd", ("bc", "abc")) == (5, 2)
    assert stop_at(decode_bytes, b"xxabcd", ("abcd", "bc")) == (5, 3)
    words = ["The ", "end", " of it"]
    assert stop_at(lambda ids: "".join(words[i] for i in ids), [0, 1, 2], ("f", "nd of", "zz")) == (3, 5)


@pytest.mark.parametrize(
    ("min_tokens", "expected"), [(0, (2, 0)), (1, (2, 0)), (2, (6, 4)), (5, (6, 4)), (6, (-1, -1))]
)
def test_stops_of_the_first_tokens_do_not_count(min_tokens: int, expected: tuple[int, int]) -> None:
    assert stop_at(decode_bytes, b"ab--ab", ("ab",), min_tokens) == expected


def test_a_decoder_that_strips_the_first_space() -> None:
    words = [" Hello", "", " big", " world"]

    def decode(token_ids: Sequence[int]) -> str:
        return "".join(words[i] for i in token_ids).removeprefix(" ")

    assert decode([0, 1, 2, 3]) == "Hello big world"
    assert stop_at(decode, [0, 1, 2, 3], (" big w",)) == (4, 5)
    assert stop_at(decode, [0, 1, 1, 3], ("oworld",)) == (-1, -1)


@given(
    st.text(alphabet="ab é😀\u0301", max_size=30),
    st.lists(st.text(alphabet="ab é😀\u0301", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(0, 12),
    st.lists(st.integers(0, 60), max_size=4),
)
def test_finds_what_the_whole_text_shows(text: str, stop: list[str], min_tokens: int, specials: list[int]) -> None:
    token_ids = list(text.encode())
    for place in specials:
        token_ids.insert(place, SPECIAL)
    found = stop_at(decode_bytes, token_ids, tuple(stop), min_tokens)
    assert found == expected_stop_at(decode_bytes, token_ids, tuple(stop), min_tokens)


@given(st.lists(st.integers(0, SPECIAL), max_size=80))
def test_in_broken_bytes_a_find_is_a_true_one(token_ids: list[int]) -> None:
    num_fed, length = stop_at(decode_bytes, token_ids, ("a", "é"))
    if num_fed >= 0:
        assert decode_bytes(token_ids[:num_fed])[length] in "aé"


@given(st.text(alphabet="the endéß日本😀 ", min_size=1, max_size=60), st.data())
def test_a_byte_level_tokenizer(text: str, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text) - 1))
    stop = (text[start : start + data.draw(st.integers(1, 5))],)
    token_ids = BYTE_LEVEL.encode(text).ids
    found = stop_at(BYTE_LEVEL.decode, token_ids, stop)
    assert found == expected_stop_at(BYTE_LEVEL.decode, token_ids, stop, 0)
    assert found[1] == text.find(stop[0])


@pytest.mark.parametrize("token_id", [ord("x"), SPECIAL, 0xFF, 0xE6])
def test_a_token_costs_the_same_however_long_the_text(token_id: int) -> None:
    sizes: list[int] = []

    def decode(token_ids: Sequence[int]) -> str:
        sizes.append(len(token_ids))
        return decode_bytes(token_ids)

    stops = StopStrings(decode, ("STOP",), 0)
    for _ in range(1000):
        assert stops.feed(token_id) is None
    assert max(sizes) <= 20
    assert len(sizes) <= 2000
    found = [stops.feed(byte) for byte in b" STOP"]
    assert found[:-1] == [None] * 4
    assert found[-1] == len(decode_bytes([token_id] * 1000)) + 1


def byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the end of the ending 日本 then ß the end"] * 3, trainer)
    return tokenizer


BYTE_LEVEL = byte_level_tokenizer()
