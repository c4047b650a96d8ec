from __future__ import annotations

from typing import Any

import pytest

from batchpipe.job.sampling import Sampling
from batchpipe.sample.on_device import samples_on_device


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "n": 3}])
def test_what_depends_on_the_row_alone_stays_there(settings: dict[str, Any]) -> None:
    assert samples_on_device(Sampling.model_validate(settings).params())


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"logit_bias": {3: 1.0}},
        {"logprobs": 2},
        {"min_tokens": 3},
    ],
)
def test_what_needs_more_is_for_the_host(settings: dict[str, Any]) -> None:
    assert not samples_on_device(Sampling.model_validate(settings).params())
