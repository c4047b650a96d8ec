"""The tensors that a model will have, from its configuration alone: for a model whose weights are not here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from batchpipe.errors import ModelError
from batchpipe.model.load import causal_lm_class


def tensor_shapes(folder: Path, config: Any, trust_remote_code: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor by name, a tied one once. The model is made on torch's meta device, which has no memory.

    Raises ModelError where the configuration makes no model.
    """
    try:
        with torch.device("meta"):
            model = causal_lm_class(folder, config, trust_remote_code)(config)
    except Exception as error:  # each model's own code raises what it likes
        raise ModelError(f"model.name: {folder / 'config.json'} makes no model: {error}") from error
    tensors = model.state_dict(keep_vars=True)
    own = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return {name: tuple(tensors[name].shape) for name in own.values()}
