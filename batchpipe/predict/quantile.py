"""The classifier that needs no training: bins of prompt length, with broad curves that every job corrects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from batchpipe.job import values as v
from batchpipe.job.strict_yaml import read_yaml
from batchpipe.predict.base import FloatArray, Survival, length_grid
from batchpipe.types import Int32Array

_PACKAGE = Path(__file__).parent.parent
_FOLDERS = (_PACKAGE / "configs" / "predictors", _PACKAGE.parent / "configs" / "predictors")  # of a wheel, a repository
# No curve of the shipped kind has anything left behind this length.
_LAST_TOKENS = 1 << 16


class Part(v.Section):
    """A Weibull distribution: P(length > t) = exp(-(t / scale) ** shape)."""

    scale_tokens: Annotated[v.Positive, Field(description="The length that 37 % outlive.")]
    shape: Annotated[v.Positive, Field(description="Below 1 it is broader than an exponential, above 1 narrower.")]


class PromptClass(v.Section):
    """Rows by the length of their prompt, and what share of them follows each part."""

    max_prompt_tokens: Annotated[v.OptionalCount, Field(description="The longest prompt; null in the last class.")]
    weights: Annotated[tuple[v.PositiveFraction, ...], Field(description="One for each part; together 1.")]


class LengthPrior(v.Section):
    """The file of the prior: classes from short prompts to long ones, of the same parts."""

    parts: Annotated[tuple[Part, ...], Field(min_length=1, description="What the classes are mixed of.")]
    classes: Annotated[tuple[PromptClass, ...], Field(min_length=1, description="In the order of their prompts.")]


class QuantileClassifier:
    """A `Classifier` for any tokenizer: the class of a prompt is its length's bin."""

    level_error = 0.5  # the curves are of no model in particular, and models differ by factors

    def __init__(self, length_prior: LengthPrior) -> None:
        bounds = [prompt_class.max_prompt_tokens for prompt_class in length_prior.classes]
        assert bounds[-1] is None and None not in bounds[:-1], "the last class alone is open"
        self._bounds_tokens = np.array(bounds[:-1], np.int64)
        self._prior = Survival(length_grid(_LAST_TOKENS), _curves(length_prior))

    @classmethod
    def shipped(cls) -> QuantileClassifier:
        """With the curves that come with the package."""
        path = shipped_folder() / "quantile.yaml"
        return cls(LengthPrior.model_validate(read_yaml(path.read_text(encoding="utf-8"), str(path))))

    @property
    def prior(self) -> Survival:
        return self._prior

    def classify(self, prompts: Sequence[Int32Array]) -> Int32Array:
        lengths = np.fromiter((len(prompt) for prompt in prompts), np.int64, len(prompts))
        return np.searchsorted(self._bounds_tokens, lengths, side="left").astype(np.int32)


def shipped_folder() -> Path:
    """The folder of what comes with the package."""
    return next(folder for folder in _FOLDERS if folder.is_dir())


def _curves(length_prior: LengthPrior) -> FloatArray:
    """[C, G] over the grid up to _LAST_TOKENS."""
    weights = np.array([prompt_class.weights for prompt_class in length_prior.classes])
    assert weights.shape[1] == len(length_prior.parts) and np.allclose(weights.sum(axis=1), 1.0)
    tokens = length_grid(_LAST_TOKENS).astype(np.float64)
    parts = np.array([np.exp(-((tokens / part.scale_tokens) ** part.shape)) for part in length_prior.parts])
    curves: FloatArray = weights @ parts
    curves[:, 0] = 1.0  # the sum of weights is 1 but for rounding
    curves[:, -1] = 0.0
    return curves
