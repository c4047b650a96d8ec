import math

import pytest

from batchpipe.errors import JobError
from batchpipe.job.strict_yaml import read_yaml


def refusal_of(text: str) -> str:
    with pytest.raises(JobError) as refusal:
        read_yaml(text, "job.yaml")
    return str(refusal.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("on", "on"),
        ("yes", "yes"),
        ("off", "off"),
        ("No", "No"),
        ("true", True),
        ("FALSE", False),
        ("012", 12),
        ("0o14", 12),
        ("0x1F", 31),
        ("-3", -3),
        ("1e3", 1000.0),
        ("1.5E-2", 0.015),
        (".5", 0.5),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-31", "2024-01-31"),
        ("~", None),
        ("null", None),
        ('"12"', "12"),
        ("'null'", "null"),
        ("4GiB", "4GiB"),
        ("", None),
        ("# nothing", None),
        ("<<", "<<"),
    ],
)
def test_scalars_are_read_as_yaml_1_2(text: str, value: object) -> None:
    read = read_yaml(text, "job.yaml")
    assert read == value
    assert type(read) is type(value)


def test_infinities_and_nan() -> None:
    assert read_yaml("[.inf, -.inf]", "job.yaml") == [math.inf, -math.inf]
    assert math.isnan(read_yaml(".nan", "job.yaml"))


def test_duplicate_key_names_the_key_and_line() -> None:
    assert refusal_of("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n") == "job.yaml, line 5, column 3: duplicate key 'c'"


def test_tab_is_named() -> None:
    assert refusal_of("a:\n\tb: 1\n") == "job.yaml, line 2, column 1: a tab character; YAML indents with spaces"


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!own 1", "!!binary YQ=="]
)
def test_tags_are_refused(tag: str) -> None:
    message = refusal_of(f"a: {tag}\n")
    assert message.startswith("job.yaml, line 1, column 4: the tag '")
    assert "is not allowed" in message


def test_aliases_that_multiply_are_refused_before_anything_is_built() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert "holds more than 100000 values once its aliases are written out" in refusal_of("\n".join(levels))


def test_alias_that_holds_itself_is_refused() -> None:
    assert "holds more than 100000 values" in refusal_of("a: &a [*a]")


def test_alias_used_honestly_is_read() -> None:
    assert read_yaml("a: &x [1]\nb: *x\n", "job.yaml") == {"a": [1], "b": [1]}


def test_deep_nesting_is_refused() -> None:
    assert "nested too deeply" in refusal_of("[" * 5000)


def test_too_long_a_text_is_refused() -> None:
    assert "at most 1048576 are read" in refusal_of("#" * ((1 << 20) + 1))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\n---\nb: 2\n", "line 2, column 1: but found another document"),
        ("a: [1, 2\n", "line 2, column 1: expected ',' or ']'"),
        ("? [a, b]\n: 1\n", "line 1, column 3: a list or mapping cannot be a key"),
        ("a: \x00", "special characters are not allowed"),
        ("!!int abc", "invalid literal"),
    ],
)
def test_what_cannot_be_parsed_is_placed(text: str, words: str) -> None:
    assert words in refusal_of(text)
