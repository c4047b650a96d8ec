"""Log probabilities of the model's own distribution, before penalties, bias and temperature."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from batchpipe.sample.draw import kth_largest_bound
from batchpipe.types import TokenLogprobs


def token_logprobs(logits: NDArray[np.float32], token_id: int, num_top: int) -> TokenLogprobs:
    """Log probabilities of `token_id` and of the `num_top` >= 1 most likely tokens; equal ones are in order of ids.

    logits: [V], the largest finite. `token_id` is among the top tokens only if it is one of the most likely.
    """
    num_top = min(num_top, len(logits))
    candidates = np.flatnonzero(logits >= kth_largest_bound(logits, num_top))
    order = np.argsort(-logits[candidates], kind="stable")[:num_top]
    top_ids = candidates[order]
    largest = logits[top_ids[0]]
    log_total = float(largest) + float(np.log(np.exp(logits - largest).sum()))
    return TokenLogprobs(
        token_id=token_id,
        logprob=float(logits[token_id]) - log_total,
        top_ids=tuple(top_ids.tolist()),
        top_logprobs=tuple((logits[top_ids].astype(np.float64) - log_total).tolist()),
    )
