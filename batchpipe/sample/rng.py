"""Counter-based random numbers: the n-th number of a stream is a pure function of (stream, n).

So a row gets the same numbers in any batch, after a preemption and in a resumed job, and no generator state is kept.
The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def stream_of(seed: int, row_id: str, sample_index: int) -> int:
    """The stream of one sample of one row, in [0, 2**63). Any integer can be the seed."""
    # The id comes last, so that no id can contain what looks like another seed or sample index.
    name = f"{seed}/{sample_index}/{row_id}".encode("utf-8", "surrogatepass")
    return xxhash.xxh3_64_intdigest(name) >> 1


def uniforms(streams: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """Number `positions[i]` of stream `streams[i]`, in the open interval (0, 1); arguments broadcast."""
    counters = _mixed(streams.astype(np.uint64)) + positions.astype(np.uint64) * _GOLDEN_GAMMA
    # 52 bits plus half a step are exact in float64 and never 0 or 1.
    steps = (_mixed(counters) >> np.uint64(12)).astype(np.float64)
    return (steps + 0.5) * 2.0**-52


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's step: adds the golden gamma and applies its finalizer, a bijection on 64 bits."""
    values = values + _GOLDEN_GAMMA
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
