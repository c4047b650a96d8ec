"""The choice of a stage's attention backend."""

from __future__ import annotations

import logging

import torch

from batchpipe.attention.base import AttentionBackend
from batchpipe.attention.cpu import CpuAttention
from batchpipe.attention.reference import ReferenceAttention

logger = logging.getLogger(__name__)


def choose_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionBackend:
    """name: auto, reference, cpu or triton. Falls back to the reference, with a warning, where kernels are missing."""
    assert name in ("auto", "reference", "cpu", "triton"), name
    if name == "reference":
        return ReferenceAttention()
    if name == "triton" or (name == "auto" and device.type == "cuda"):
        return _triton_attention()
    if device.type != "cpu":
        return ReferenceAttention()
    if not CpuAttention.supports(dtype, head_dim):
        logger.warning("no CPU kernels for %s with heads of %d numbers: attention is slow", dtype, head_dim)
        return ReferenceAttention()
    return CpuAttention.open() or ReferenceAttention()


def _triton_attention() -> AttentionBackend:
    try:
        from batchpipe.attention.triton_attention import TritonAttention
    except ImportError as error:
        logger.warning("no Triton here (%s): attention on the GPU is very slow", error)
        return ReferenceAttention()
    return TritonAttention()
