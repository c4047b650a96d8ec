"""The choice of a stage's attention backend."""

from __future__ import annotations

import logging

import torch

from batchpipe.attention.base import AttentionBackend
from batchpipe.attention.cpu import CpuAttention
from batchpipe.attention.reference import ReferenceAttention

logger = logging.getLogger(__name__)


def choose_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
    """name: auto, reference or cpu. Falls back to the reference, with a warning, if there are no C kernels."""
    assert name in ("auto", "reference", "cpu"), name
    if name == "reference" or device.type != "cpu":
        return ReferenceAttention()
    if not CpuAttention.supports(dtype, head_dim):
        logger.warning("no CPU kernels for %s with heads of %d numbers: attention is slow", dtype, head_dim)
        return ReferenceAttention()
    return CpuAttention.open() or ReferenceAttention()
