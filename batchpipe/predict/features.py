"""A prompt as a set of features: its tokens, its pairs of neighbouring tokens, and its length.

Of a long prompt only the first and last tokens are used, because the instruction is usually there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from batchpipe.types import Int32Array

Int64Array = NDArray[np.int64]

# Changes whenever a feature number gets another meaning; files of trained predictors name the version they use.
FEATURES_VERSION = 1

END_TOKENS = 256
_LENGTH_BINS_PER_OCTAVE = 3
_NUM_LENGTH_BINS = 64
_NUM_PAIR_BINS = 1 << 18
_PAIR_MULTIPLIER = 1_000_003


def presence(prompts: Sequence[Int32Array]) -> tuple[Int64Array, Int64Array]:
    """Two arrays [P], prompts and features: prompt i has feature j. Each pair occurs once, in increasing order.

    Feature numbers start with the bins of prompt length, followed by hashed pairs of neighbouring tokens and token ids.
    """
    lengths = np.fromiter((len(prompt) for prompt in prompts), np.int64, len(prompts))
    ends = [_ends(prompt) for prompt in prompts]
    tokens = np.concatenate([np.zeros(0, np.int64), *ends])
    rows = np.repeat(np.arange(len(prompts)), [len(end) for end in ends])
    neighbours = rows[1:] == rows[:-1]
    pairs = (tokens[:-1] * _PAIR_MULTIPLIER + tokens[1:])[neighbours] % _NUM_PAIR_BINS
    octaves = np.log2(np.maximum(lengths, 1)) * _LENGTH_BINS_PER_OCTAVE
    length_bins = np.minimum(octaves.astype(np.int64), _NUM_LENGTH_BINS - 1)

    found_rows = np.concatenate([np.arange(len(prompts)), rows[1:][neighbours], rows])
    found = np.concatenate([length_bins, _NUM_LENGTH_BINS + pairs, _NUM_LENGTH_BINS + _NUM_PAIR_BINS + tokens])
    stride = int(found.max(initial=0)) + 1
    both = np.unique(found_rows * stride + found)
    return both // stride, both % stride


def _ends(prompt: Int32Array) -> Int64Array:
    if len(prompt) > 2 * END_TOKENS:
        prompt = np.concatenate([prompt[:END_TOKENS], prompt[-END_TOKENS:]])
    return prompt.astype(np.int64)
