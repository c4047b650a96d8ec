"""Checksums that show whether KV came back from the host as it went: one number for every token of a host block.

A token's checksum is the sum over layers, keys and values, and heads of weight * (the sum modulo 2**32 of its numbers'
bits, read as integers), modulo 2**64. Weights are odd and differ, so that a change of any head's sum is seen, and rows
of different layers or heads are not taken for one another.

Shapes: L layers of one stage, H KV heads, R rows of a block, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchpipe.kv.pool import INTEGERS
from batchpipe.types import BoolArray, Int32Array

_SEED = 20


def row_weights(num_layers: int, num_kv_heads: int, device: torch.device) -> Tensor:
    """int64 [L, 2, H], all odd."""
    generator = torch.Generator().manual_seed(_SEED)
    limits = torch.iinfo(torch.int64)
    weights = torch.randint(limits.min, limits.max, (num_layers, 2, num_kv_heads), generator=generator)
    return (weights | 1).to(device)


def token_checks(tokens: Tensor, weights: Tensor) -> Tensor:
    """tokens [T, L, 2, H, D] -> int64 [T]."""
    return (_sums(tokens) * weights).sum((1, 2, 3))


def block_checks(blocks: Tensor, weights: Tensor) -> Tensor:
    """blocks [N, L, 2, H, R, D] -> int64 [N, R]. For some of the layers, with their weights: their part of the sum."""
    return (_sums(blocks) * weights[..., None]).sum((1, 2, 3))


def _sums(numbers: Tensor) -> Tensor:
    """[..., D] -> int32 [...]. For a sum of type int64 torch would first convert, and store, all numbers."""
    return numbers.view(INTEGERS[numbers.dtype.itemsize]).sum(-1, dtype=torch.int32)


@dataclass(frozen=True, slots=True)
class Expected:
    """Both [N, R]: which tokens of N blocks are known, and their checksums."""

    known: BoolArray
    checks: NDArray[np.int64]

    def differ(self, found: NDArray[np.int64]) -> BoolArray:
        """found: checksums [N, R] of what came back -> [N]: a known token of the block has changed."""
        wrong: BoolArray = (self.known & (self.checks != found)).any(1)
        return wrong


class HostChecks:
    """The checksums of the tokens in the host's blocks."""

    def __init__(self, num_host_blocks: int, block_tokens: int) -> None:
        self._checks = np.zeros((num_host_blocks, block_tokens), np.int64)
        self._known = np.zeros((num_host_blocks, block_tokens), np.bool_)

    def put(self, host_blocks: Int32Array, rows: Int32Array, checks: NDArray[np.int64]) -> None:
        """Tokens [T] were stored. A block whose row 0 is among them begins anew."""
        self._known[host_blocks[rows == 0]] = False
        self._known[host_blocks, rows] = True
        self._checks[host_blocks, rows] = checks

    def copy(self, host_copies: Int32Array) -> None:
        """host_copies [C, 2]: source block, target block."""
        self._known[host_copies[:, 1]] = self._known[host_copies[:, 0]]
        self._checks[host_copies[:, 1]] = self._checks[host_copies[:, 0]]

    def look(self, host_blocks: Int32Array) -> Expected:
        """The checksums that blocks [N] must have now."""
        return Expected(self._known[host_blocks], self._checks[host_blocks])
