"""The size of a KV block that attention is fastest with on a device, and where the C kernels serve. No torch."""

from __future__ import annotations

from batchpipe.native.build import load_kernels

MAX_HEAD_DIM = 256
CPU_KERNELS_BLOCK_TOKENS = 64
BLOCK_TOKENS = 16  # of every other backend


def cpu_kernels_serve(dtype: str, head_dim: int) -> bool:
    """Whether native/attention.c computes in this type, by torch's name of it, and with such heads."""
    return dtype in ("float32", "bfloat16") and head_dim % 16 == 0 and head_dim <= MAX_HEAD_DIM


def default_block_tokens(name: str, device: str, dtype: str, head_dim: int) -> int:
    """`default_block_tokens` of the backend that `attention.choose` would choose; name: as there, device: cpu or cuda.

    Compiles the C kernels where they are not compiled yet.
    """
    on_kernels = name != "reference" and device == "cpu" and cpu_kernels_serve(dtype, head_dim)
    return CPU_KERNELS_BLOCK_TOKENS if on_kernels and load_kernels() is not None else BLOCK_TOKENS
