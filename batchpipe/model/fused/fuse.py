"""Replaces parts of a loaded transformers model by faster ones that are seen to compute the same.

transformers has hundreds of architectures, and a part's name says little about what it does. So nothing is replaced
on its name: a stand-in is built where a module has the right pieces, both are run on the same random input, and only
one that agrees to rounding stays. Whatever differs (a clipped projection, another rotation) is left as it is.
"""

from __future__ import annotations

import torch
from torch import nn

from batchpipe.model.fused.cpu import fuse_on_cpu


@torch.inference_mode()
def fuse(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Returns the names of the modules replaced.

    float32 is left alone: its greedy tokens are promised to be those of transformers.
    """
    kinds = {parameter.device.type for parameter in model.parameters()}
    if kinds == {"cpu"} and dtype == torch.bfloat16:
        return fuse_on_cpu(model)
    if kinds == {"cuda"} and dtype in (torch.bfloat16, torch.float16):
        from batchpipe.model.fused.gpu import fuse_on_gpu  # needs Triton

        return fuse_on_gpu(model)
    return []
