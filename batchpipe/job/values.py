"""The types of value that a job file can hold: what each accepts, and the words that an error uses for it.

Each type ends with `Expects`, so that the message is "<key>: <value> is not <words>" whichever of pydantic's checks
failed. Types are strict because YAML already distinguishes numbers, strings and booleans: "1" is not a number and true
is not an integer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, Strict, WithJsonSchema


@dataclass(frozen=True, slots=True)
class Expects:
    """What a field accepts, in words that complete the sentence "<key>: <value> is not ..."."""

    words: str


def about(description: str) -> Any:
    """Describes a key in the JSON Schema of the job file."""
    return Field(description=description)


class Section(BaseModel):
    """A frozen group of keys; unknown keys, NaN and infinity are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB)?")
_UNIT_BYTES = {None: 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def parse_size(value: Any) -> Any:
    """Bytes of "4GiB", "512MiB" or "1024" (else ValueError); values that are not strings pass to the next check."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError("not a size")
    number, unit = match.groups()
    size_bytes = float(number) * _UNIT_BYTES[unit] if "." in number else int(number) * _UNIT_BYTES[unit]
    if size_bytes != int(size_bytes):
        raise ValueError("not a whole number of bytes")
    return int(size_bytes)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _token_biases(value: Any) -> Any:
    """Reads a key "50256" as 50256, because the keys of a JSON object can only be strings."""
    if not isinstance(value, Mapping):
        return value
    biases = {int(key) if isinstance(key, str) and key.isdecimal() else key: bias for key, bias in value.items()}
    if len(biases) < len(value):
        raise ValueError("a token id is given twice")
    return biases


Flag = Annotated[bool, Strict(), Expects("true or false")]
_Nonempty = Annotated[str, Strict(), MinLen(1)]
Name = Annotated[_Nonempty, Expects("a nonempty string; put quotes around one that reads as something else")]
OptionalName = Annotated[_Nonempty | None, Expects("null or a nonempty string (quote what reads as a number)")]
OptionalText = Annotated[Annotated[str, Strict()] | None, Expects("null or a string (quote what reads as a number)")]

One = Annotated[int, Strict(), Ge(1), Le(1), Expects("1, the only version there is")]
Count = Annotated[int, Strict(), Ge(1), Expects("an integer >= 1")]
CountOrZero = Annotated[int, Strict(), Ge(0), Expects("an integer >= 0")]
OptionalCount = Annotated[Annotated[int, Strict(), Ge(1)] | None, Expects("null or an integer >= 1")]
AutoCount = Annotated[Literal["auto"] | Annotated[int, Strict(), Ge(1)], Expects("'auto' or an integer >= 1")]
Fraction = Annotated[float, Strict(), Ge(0), Le(1), Expects("a number from 0 to 1")]

_Bytes = Annotated[int, Strict(), BeforeValidator(parse_size, json_schema_input_type=int | str)]
Size = Annotated[_Bytes, Ge(1), Expects("a size above zero such as 4GiB, 512MiB, 64KiB or 1024 (bytes)")]
AutoSize = Annotated[
    Literal["auto"] | Annotated[_Bytes, Ge(1)],
    Expects("'auto' or a size above zero such as 4GiB, 512MiB, 64KiB or 1024 (bytes)"),
]
SizeOrZero = Annotated[_Bytes, Ge(0), Expects("0 or a size such as 4GiB, 512MiB, 64KiB or 1024 (bytes)")]

Strings = Annotated[tuple[_Nonempty, ...], BeforeValidator(_listed, json_schema_input_type=str | list[str])]
Paths = Annotated[Strings, MinLen(1), Expects("a path, or a nonempty list of paths")]
StopStrings = Annotated[Strings, MaxLen(64), Expects("a nonempty string, or a list of at most 64 of them")]
Reasoning = Annotated[
    Literal["auto"] | tuple[_Nonempty, _Nonempty] | None, Expects("'auto', the two markers [begin, end], or null")
]
Columns = Annotated[Literal["all", "none"] | tuple[_Nonempty, ...], Expects("'all', 'none' or a list of column names")]

Variables = Annotated[
    dict[_Nonempty, JsonValue],
    WithJsonSchema({"type": "object"}),
    Expects("a mapping of names to values, such as {enable_thinking: false}"),
]

TokenId = Annotated[int, Strict(), Ge(0), Le((1 << 31) - 1)]
TokenIds = Annotated[tuple[TokenId, ...], Expects("a list of token ids (integers >= 0)")]
LogitBias = Annotated[
    dict[TokenId, Annotated[float, Strict(), Ge(-100), Le(100)]],
    BeforeValidator(_token_biases),
    Expects("a mapping of token ids (integers >= 0, each once) to numbers from -100 to 100"),
]
Positive = Annotated[float, Strict(), Gt(0), Expects("a finite number > 0")]
PositiveOrZero = Annotated[float, Strict(), Ge(0), Expects("a finite number >= 0")]
PositiveFraction = Annotated[float, Strict(), Gt(0), Le(1), Expects("a number above 0, up to 1")]
Penalty = Annotated[float, Strict(), Ge(-2), Le(2), Expects("a number from -2 to 2")]
SampleCount = Annotated[int, Strict(), Ge(1), Le(128), Expects("an integer from 1 to 128")]
LogprobCount = Annotated[int, Strict(), Ge(0), Le(20), Expects("an integer from 0 (off) to 20")]
Seed = Annotated[int, Strict(), Ge(0), Le((1 << 63) - 1), Expects("an integer from 0 to 2^63 - 1")]
BlockTokens = Annotated[
    Literal["auto"] | Annotated[int, Strict(), Ge(1), Le(256)], Expects("'auto' or an integer from 1 to 256")
]
