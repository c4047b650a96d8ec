import pytest

from batchpipe.errors import RowError
from batchpipe.job import Sampling
from batchpipe.types import ErrorCode, SamplingParams


def refusal_of(values: dict[str, object]) -> str:
    with pytest.raises(RowError) as refusal:
        Sampling(max_tokens=10).override(values)
    assert refusal.value.code is ErrorCode.INVALID_SAMPLING
    return refusal.value.message


def test_given_values_replace_and_null_values_do_not() -> None:
    base = Sampling(max_tokens=10, temperature=0.3, stop=("a",))
    merged = base.override({"temperature": 1, "max_tokens": None, "stop": ["b", "c"]})
    assert (merged.temperature, merged.max_tokens, merged.stop) == (1.0, 10, ("b", "c"))
    assert (base.temperature, base.stop) == (0.3, ("a",))


def test_nothing_given_changes_nothing() -> None:
    base = Sampling(seed=5, column="settings")
    assert base.override({"seed": None}) == base


def test_the_merged_settings_are_checked_not_each_alone() -> None:
    assert refusal_of({"min_tokens": 11}) == "min_tokens: 11 is more than max_tokens, which is 10"
    assert Sampling(max_tokens=10).override({"min_tokens": 11, "max_tokens": 12}).min_tokens == 11


def test_each_wrong_value_is_named() -> None:
    message = refusal_of({"temperature": -1, "n": 0, "seed": 4})
    assert message == "temperature: -1 is not a finite number >= 0; n: 0 is not an integer from 1 to 128"


def test_unknown_keys_are_errors_even_when_null() -> None:
    assert refusal_of({"temprature": None}) == "temprature: unknown key; did you mean 'temperature'?"
    assert refusal_of({"column": "a"}) == "column: unknown key"


def test_text_and_booleans_are_no_numbers() -> None:
    assert "top_k: '5' is not an integer >= 0" in refusal_of({"top_k": "5"})
    assert "logprobs: true is not an integer" in refusal_of({"logprobs": True})


def test_params_are_the_settings() -> None:
    params = Sampling(temperature=0.5, stop=("x",), logit_bias={3: 1.0}, n=2).params()
    assert isinstance(params, SamplingParams)
    assert (params.temperature, params.stop, params.logit_bias, params.n) == (0.5, ("x",), {3: 1.0}, 2)
    assert params.max_tokens == Sampling().max_tokens
