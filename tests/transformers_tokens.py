"""What `transformers.generate` makes of a prompt: the yardstick of greedy sameness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from transformers._typing import GenerativePreTrainedModel


def greedy_tokens(folder: Path, prompts: Sequence[Sequence[int]], num_new_tokens: int) -> list[tuple[int, ...]]:
    """Each prompt's `num_new_tokens` tokens, one prompt at a time in float32; nothing ends a text earlier."""
    model = cast("GenerativePreTrainedModel", AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    model.generation_config.eos_token_id = None
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=num_new_tokens)
        assert isinstance(output, torch.Tensor)
        texts.append(tuple(output[0, len(prompt) :].tolist()))
    return texts
