"""What the masks of transformers let each layer see, where the model itself does not tell its attention.

transformers makes masks for its own attention and none for others'. A model may keep its window there alone (Phi-MoE
does). So the loaded model runs once over two tokens with masks that say how they were made, and each layer gets the
window of its mask. A mask that is neither causal nor a window is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from batchpipe.errors import ModelError

_FAR = 1 << 20  # tokens; a mask without a window reaches further
_NUM_TOKENS = 2


class MaskProbe:
    """Stands for the attention inputs of a step; `_attend` of `load` tells it what each layer gets."""

    def see(self, module: nn.Module, mask: Tensor | None, window: int | None) -> None:
        """window: what the model itself passes to attention."""
        seen = getattr(mask, "batchpipe_window", _FAR + 1)
        if seen > _FAR:  # no mask, or one that the model made itself of ours
            return
        own = seen or None
        if own != window:
            module.mask_window = own  # type: ignore[assignment]


@contextmanager
def marked_masks(name: str) -> Iterator[None]:
    """While inside, masks for attention of this name carry their window. Raises ModelError for other masks."""
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, _marked_mask)
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[name]


def probe_inputs(model: Any, *, is_first: bool, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Two tokens, or the hidden states of two."""
    positions = torch.arange(_NUM_TOKENS, device=device)[None]
    if is_first:
        return {"input_ids": positions * 0, "position_ids": positions}
    hidden = torch.zeros(1, _NUM_TOKENS, model.config.hidden_size, device=device, dtype=dtype)
    return {"inputs_embeds": hidden, "position_ids": positions}


def _marked_mask(
    *, q_length: int, kv_length: int, mask_function: Callable[..., Any], local_size: int | None = None, **_: Any
) -> Tensor:
    """bool [1, 1, q_length, kv_length] with the attribute `batchpipe_window`, 0 for none."""

    def sees(query: int, key: int) -> bool:
        """The mask functions index nothing by position beyond what their window says."""
        places = (torch.tensor(number) for number in (0, 0, query, key))
        return bool(mask_function(*places))

    window = local_size or 0
    if local_size is None:
        is_known = sees(_FAR, 0) and sees(_FAR, _FAR) and not sees(0, 1)
    else:
        edges = [(window, 0, False), (window, 1, True), (window + 1, 1, False), (window + 1, 2, True), (0, 1, False)]
        is_known = all(sees(query, key) is visible for query, key, visible in edges)
    if not is_known:
        raise ModelError("model.name: it has a mask that is neither causal nor a sliding window, such as chunks")
    mask = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool)
    mask.batchpipe_window = window  # type: ignore[attr-defined]
    return mask
