"""The windows that transformers' masks have, and the masks that are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from batchpipe.errors import ModelError
from batchpipe.model.load import load_stage
from batchpipe.model.mask_window import marked_masks
from tests.tiny_models import tiny_model


def mask_of(function: Any, local_size: int | None = None) -> Any:
    with marked_masks("a name"):
        make = ALL_MASK_ATTENTION_FUNCTIONS["a name"]
        return make(q_length=2, kv_length=2, mask_function=function, local_size=local_size, batch_size=1)


def test_a_mask_carries_its_window() -> None:
    assert mask_of(causal_mask_function).batchpipe_window == 0
    assert mask_of(sliding_window_causal_mask_function(9), 9).batchpipe_window == 9
    assert "a name" not in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping


def test_other_masks_are_refused() -> None:
    with pytest.raises(ModelError, match="neither causal nor a sliding window"):
        mask_of(chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.int)), 8)
    with pytest.raises(ModelError, match="neither causal nor a sliding window"):
        mask_of(lambda batch, head, query, key: key <= key)


@pytest.mark.parametrize(("architecture", "window"), [("phimoe", 8), ("mistral", None), ("gemma3", None)])
def test_layers_get_the_window_that_only_their_mask_knows(architecture: str, window: int | None) -> None:
    """None: the model passes its windows to attention itself."""
    stage = load_stage(tiny_model(architecture), range(4), is_first=True, is_last=True, dtype=torch.float32)
    found = [getattr(layer.self_attn, "mask_window", None) for layer in stage.model.base_model.layers]
    assert found == [window] * 4
