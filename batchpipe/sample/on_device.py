"""Which rows of logits can be sampled where they are, on the device."""

from __future__ import annotations

from batchpipe.types import SamplingParams


def samples_on_device(sampling: SamplingParams) -> bool:
    """Whether a token depends on the logits, the settings and the row's random stream alone.

    Penalties depend on the tokens before, minimum lengths and biases on lists of tokens, and log probabilities leave
    the sampler beside the token: the host's sampler does these.
    """
    neutral = (1.0, 0.0, 0.0)
    return (
        (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == neutral
        and not sampling.logit_bias
        and not sampling.logprobs
        and not sampling.min_tokens
    )
