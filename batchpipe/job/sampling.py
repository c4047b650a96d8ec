"""The settings of sampling, with their defaults and checks, for the whole job and for a row's overrides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ValidationError, model_validator
from pydantic_core import PydanticCustomError

from batchpipe.errors import RowError
from batchpipe.job import values as v
from batchpipe.job.explain import explain, unknown_key
from batchpipe.types import ErrorCode, SamplingParams


class Sampling(v.Section):
    """How tokens are sampled. Token ids are compared with the vocabulary later, when the tokenizer is known."""

    max_tokens: Annotated[v.Count, v.about("Most tokens of a completion; cut to what the context leaves.")] = 256
    temperature: Annotated[v.PositiveOrZero, v.about("0 is greedy: the likeliest token, always.")] = 0.0
    top_p: Annotated[v.PositiveFraction, v.about("Sample from the likeliest tokens that reach this sum.")] = 1.0
    top_k: Annotated[v.CountOrZero, v.about("Sample from this many likeliest tokens; 0 is off.")] = 0
    min_p: Annotated[v.Fraction, v.about("Drop tokens less likely than this share of the likeliest.")] = 0.0
    repetition_penalty: Annotated[
        v.Positive, v.about("Divides the logits of tokens seen in prompt or completion; 1 is off.")
    ] = 1.0
    presence_penalty: Annotated[v.Penalty, v.about("Taken from logits of tokens generated before.")] = 0.0
    frequency_penalty: Annotated[v.Penalty, v.about("Taken once for each time a token was generated.")] = 0.0
    logit_bias: Annotated[v.LogitBias, v.about("Added to the logits of these token ids.")] = {}
    stop: Annotated[v.StopStrings, v.about("Strings that end a completion and are cut from it.")] = ()
    stop_token_ids: Annotated[v.TokenIds, v.about("Token ids that end a completion.")] = ()
    ignore_eos: Annotated[v.Flag, v.about("Go on after the model's end token.")] = False
    min_tokens: Annotated[v.CountOrZero, v.about("Tokens before anything may end the completion.")] = 0
    n: Annotated[v.SampleCount, v.about("Samples of each row.")] = 1
    seed: Annotated[
        v.Seed, v.about("A row's stream follows from (seed, row id, sample index): batch order never matters.")
    ] = 0
    logprobs: Annotated[v.LogprobCount, v.about("Likeliest tokens to report at each place; 0 is off.")] = 0
    keep_special_tokens: Annotated[
        v.Flag, v.about("Keep special tokens, such as marks of tool calls, in the completion.")
    ] = False
    defaults: Annotated[
        Literal["job", "model"],
        v.about(
            "model takes keys that the job does not set from the model's generation_config.json; job names what that "
            "file asks for and does without."
        ),
    ] = "job"
    column: Annotated[
        v.OptionalName, v.about("Column with a struct or JSON object that overrides these settings for its row.")
    ] = None

    @model_validator(mode="after")
    def _minimum_fits(self) -> Sampling:
        if self.min_tokens > self.max_tokens:
            raise PydanticCustomError(
                "related_keys",
                "min_tokens: {minimum} is more than max_tokens, which is {maximum}",
                {"minimum": self.min_tokens, "maximum": self.max_tokens},
            )
        return self

    def override(self, values: Mapping[str, Any]) -> Sampling:
        """These settings, replaced by those of a row's `values` that are not null.

        Raises RowError (INVALID_SAMPLING) naming each wrong key, its value and what it takes.
        """
        unknown = [key for key in values if key not in _ROW_KEYS]
        if unknown:
            lines = [unknown_key((), key, _ROW_KEYS) for key in unknown]
            raise RowError(ErrorCode.INVALID_SAMPLING, "; ".join(lines))
        merged = {**self.__dict__, **{key: value for key, value in values.items() if value is not None}}
        try:
            return Sampling.model_validate(merged)
        except ValidationError as error:
            raise RowError(ErrorCode.INVALID_SAMPLING, "; ".join(explain(error, Sampling, merged))) from None

    def params(self) -> SamplingParams:
        """The settings as the frozen value that requests carry."""
        return SamplingParams(**{key: self.__dict__[key] for key in _ROW_KEYS})


_ROW_KEYS = tuple(key for key in Sampling.model_fields if key not in ("column", "defaults"))
