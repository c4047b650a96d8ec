"""The classifier that needs no training: bins of prompt length, with broad curves that each job's rows correct."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from batchpipe.job import values as v
from batchpipe.job.shipped import shipped_files
from batchpipe.job.strict_yaml import read_yaml_file
from batchpipe.predict.base import FloatArray, Survival, length_grid
from batchpipe.types import Int32Array

_LAST_TOKENS = 1 << 16  # the curves end here


class Part(v.Section):
    """A Weibull distribution: P(length > t) = exp(-(t / scale) ** shape)."""

    scale_tokens: Annotated[v.Positive, v.about("The length that 37 % of the rows exceed.")]
    shape: Annotated[v.Positive, v.about("Below 1 it is broader than an exponential, above 1 narrower.")]


class PromptClass(v.Section):
    """Rows with prompts of some length, and the share of them that follows each part."""

    max_prompt_tokens: Annotated[v.OptionalCount, v.about("The longest prompt; null in the last class.")]
    weights: Annotated[tuple[v.PositiveFraction, ...], v.about("One for each part; their sum is 1.")]


class LengthPrior(v.Section):
    """The file of the prior: classes from short prompts to long ones, each a mixture of the same parts."""

    parts: Annotated[tuple[Part, ...], Field(min_length=1, description="The distributions that are mixed.")]
    classes: Annotated[
        tuple[PromptClass, ...], Field(min_length=1, description="In the order of their prompt lengths.")
    ]


class QuantileClassifier:
    """A `Classifier` for any tokenizer: the class of a prompt is the bin of its length."""

    level_error = 0.5  # the curves are of no particular model, and the lengths of models differ by factors

    def __init__(self, length_prior: LengthPrior) -> None:
        bounds = [prompt_class.max_prompt_tokens for prompt_class in length_prior.classes]
        assert bounds[-1] is None and None not in bounds[:-1], "only the last class may be open"
        self._bounds_tokens = np.array(bounds[:-1], np.int64)
        self._prior = Survival(length_grid(_LAST_TOKENS), _curves(length_prior))

    @classmethod
    def shipped(cls) -> QuantileClassifier:
        """With the curves that come with the package."""
        return cls(LengthPrior.model_validate(read_yaml_file(shipped_files("predictors")["quantile"])))

    @property
    def prior(self) -> Survival:
        return self._prior

    def classify(self, prompts: Sequence[Int32Array]) -> Int32Array:
        lengths = np.fromiter((len(prompt) for prompt in prompts), np.int64, len(prompts))
        return np.searchsorted(self._bounds_tokens, lengths, side="left").astype(np.int32)


def _curves(length_prior: LengthPrior) -> FloatArray:
    """[C, G]: the survival curve of each class over the grid up to _LAST_TOKENS."""
    weights = np.array([prompt_class.weights for prompt_class in length_prior.classes])
    assert weights.shape[1] == len(length_prior.parts) and np.allclose(weights.sum(axis=1), 1.0)
    tokens = length_grid(_LAST_TOKENS).astype(np.float64)
    parts = np.array([np.exp(-((tokens / part.scale_tokens) ** part.shape)) for part in length_prior.parts])
    curves: FloatArray = weights @ parts
    curves[:, 0] = 1.0  # the sum of the weights is 1 except for rounding
    curves[:, -1] = 0.0
    return curves
