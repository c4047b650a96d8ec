from __future__ import annotations

import pytest
import torch

from batchpipe.attention.block_tokens import default_block_tokens
from batchpipe.attention.choose import choose_backend


@pytest.mark.parametrize("name", ["auto", "reference", "cpu"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [16, 24, 128, 256, 512])
def test_it_is_that_of_the_backend_that_is_chosen(name: str, device: str, dtype: str, head_dim: int) -> None:
    backend = choose_backend(name, torch.device(device), getattr(torch, dtype), head_dim)
    assert default_block_tokens(name, device, dtype, head_dim) == backend.default_block_tokens
