"""Copies between a GPU and pinned host memory by kernels: thousands of small pieces in one launch.

A few programs are enough for the link, and leave the multiprocessors to what computes beside them.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from batchpipe.kv.pool import KvPool
from batchpipe.types import Int32Array

_NUM_PROGRAMS = 32
_WORDS = 2048  # of eight bytes, that a program copies at a time
_ROWS = 32  # of one head and one token each


@triton.jit
def pieces_kernel(
    targets, sources, to, of, target_stride, source_stride, num_pieces, num_parts, num_words, WORDS: tl.constexpr
):  # fmt: skip
    """Piece of[i] of `sources` to place to[i] of `targets`, in words of eight bytes."""
    for task in range(tl.program_id(0), num_pieces * num_parts, tl.num_programs(0)):
        piece, part = task // num_parts, task % num_parts
        at = part * WORDS + tl.arange(0, WORDS)
        shown = at < num_words
        source = sources + tl.load(of + piece) * source_stride + at
        target = targets + tl.load(to + piece) * target_stride + at
        tl.store(target, tl.load(source, mask=shown), mask=shown)


@triton.jit
def tokens_kernel(
    tokens, pool, blocks, rows, num_tokens, num_planes, block_stride, plane_stride,
    TO_POOL: tl.constexpr, BLOCK_TOKENS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """tokens [T, planes, D] to row rows[i] of block blocks[i] of a pool, or from there.

    A plane is a layer's keys or values of one head: all of a block's lie one behind the other.
    """
    num_parts = tl.cdiv(num_planes, ROWS)
    for task in range(tl.program_id(0), num_tokens * num_parts, tl.num_programs(0)):
        token, part = task // num_parts, task % num_parts
        plane = part * ROWS + tl.arange(0, ROWS)
        columns = tl.arange(0, WIDTH)
        shown = (plane < num_planes)[:, None] & (columns < D)[None, :]
        own = tokens + token.to(tl.int64) * num_planes * D + plane[:, None] * D + columns[None, :]
        place = tl.load(blocks + token).to(tl.int64) * block_stride + tl.load(rows + token) * D
        theirs = pool + place + plane[:, None].to(tl.int64) * plane_stride + columns[None, :]
        if TO_POOL:
            tl.store(theirs, tl.load(own, mask=shown), mask=shown)
        else:
            tl.store(own, tl.load(theirs, mask=shown), mask=shown)


def copy_pieces_on_gpu(targets: Tensor, to: Int32Array, sources: Tensor, of: Int32Array) -> None:
    """See `copy_pieces`; on the current stream. The pieces' size and place are multiples of eight bytes."""
    assert targets.shape[1] % 8 == targets.stride(0) % 8 == sources.stride(0) % 8 == 0
    if not len(to):
        return
    device = targets.device if targets.is_cuda else sources.device
    numbers = torch.from_numpy(np.stack([to, of]).astype(np.int64)).to(device)
    num_words = targets.shape[1] // 8
    num_parts = triton.cdiv(num_words, _WORDS)
    pieces_kernel[(min(_NUM_PROGRAMS, len(to) * num_parts),)](
        _words(targets), _words(sources), numbers[0], numbers[1], targets.stride(0) // 8, sources.stride(0) // 8,
        len(to), num_parts, num_words, WORDS=_WORDS, num_warps=8,
    )  # fmt: skip


def copy_tokens(tokens: Tensor, pool: KvPool, blocks: Tensor, rows: Tensor, *, to_pool: bool) -> None:
    """tokens [T, L, 2, Hkv, D], on the GPU, to the pool's blocks, or from there; on the current stream.

    blocks, rows: int32 [T], on the GPU. The pool is on the GPU or pinned.
    """
    num_tokens, head_dim = len(tokens), pool.head_dim
    num_planes = tokens[0].numel() // head_dim
    num_tasks = num_tokens * triton.cdiv(num_planes, _ROWS)
    # Within the device the whole of it copies; the link is full with a few programs.
    num_programs = num_tasks if pool.device.type == "cuda" else min(_NUM_PROGRAMS, num_tasks)
    tokens_kernel[(num_programs,)](
        tokens, pool.data, blocks, rows, num_tokens, num_planes, pool.data.stride(0), pool.block_tokens * head_dim,
        TO_POOL=to_pool, BLOCK_TOKENS=pool.block_tokens, D=head_dim, WIDTH=triton.next_power_of_2(head_dim),
        ROWS=_ROWS, num_warps=4,
    )  # fmt: skip


def on_gpu(numbers: NDArray[np.int32], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers, np.int32)).to(device)


def _words(pieces: Tensor) -> Tensor:
    """The pieces' memory as eight-byte words, for its address alone."""
    return pieces.as_strided((pieces.shape[1],), (1,)).view(torch.int64)
