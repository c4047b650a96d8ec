"""The copies between one stage's two tiers of KV.

To the device go whole blocks, or one layer of them after the other; to the host new tokens, by way of a staging buffer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes import c_int64, c_void_p

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchpipe.kv.pool import INTEGERS, KEY, KvPool
from batchpipe.native.build import load_kernels
from batchpipe.pipeline.memory import NUM_STAGING_BUFFERS
from batchpipe.pipeline.swap.copy_engine import Fault
from batchpipe.pipeline.swap.step_transfers import StepTransfers
from batchpipe.types import Int32Array

# A GPU's copy engine takes longer to be told of a smaller piece than to copy it.
_LARGE_PIECE_BYTES = 1 << 20


class BlockCopies:
    """The computing thread calls `staging_of`, the announcing thread `loads_of`, a copy engine's thread the others."""

    def __init__(self, pool: KvPool, host_pool: KvPool, max_step_tokens: int, faults: tuple[Fault, ...]) -> None:
        self._device = pool.device
        self._pool, self._host_pool = pool, host_pool
        self._num_blocks = pool.num_blocks
        self._device_slots = _layer_slots(pool)
        self._host_slots = _layer_slots(host_pool)
        self._host_rows = host_pool.data.view(INTEGERS[pool.dtype.itemsize]).numpy()
        shape = (max_step_tokens, pool.num_layers, 2, pool.num_kv_heads, pool.head_dim)
        self._staging = [torch.zeros(shape, dtype=pool.dtype, device=pool.device) for _ in range(NUM_STAGING_BUFFERS)]
        self._faults = {(one.kind, one.step_id, one.number) for one in faults}

    def staging_of(self, moves: StepTransfers) -> Tensor:
        """[T, L, 2, Hkv, D]: the step's new KV, filled while it is computed."""
        return _of(moves, self._staging)

    def stage(self, moves: StepTransfers) -> None:
        """On a GPU, once a step is computed whose blocks are all in the pool: its new KV to the staging buffer."""
        from batchpipe.pipeline.swap.triton_copies import copy_tokens, on_gpu

        blocks, rows = (on_gpu(numbers, self._device) for numbers in (moves.device_blocks, moves.host_rows))
        copy_tokens(_of(moves, self._staging), self._pool, blocks, rows, to_pool=False)

    def loads_of(self, moves: StepTransfers) -> tuple[Int32Array, Int32Array]:
        """The step's loads [M, 2], and those that come too late, which only a fault makes."""
        loads = moves.transfers.loads.copy()
        is_late = np.zeros(len(loads), np.bool_)
        for kind, step_id, number in self._faults:
            if step_id != moves.step.step_id or number >= len(loads):
                continue
            if kind == "wrong_source":
                loads[number, 0] = (loads[number, 0] + 1) % len(self._host_slots)
            elif kind == "wrong_target":
                loads[number, 1] = (loads[number, 1] + 1) % self._num_blocks
            elif kind == "late":
                is_late[number] = True
        return loads[~is_late], loads[is_late]

    def load(self, loads: Int32Array) -> None:
        """Copies whole blocks; loads [M, 2]: host block, device block."""
        copy_pieces(self._device_slots.flatten(1), loads[:, 1], self._host_slots.flatten(1), loads[:, 0])

    def load_layer(self, loads: Int32Array, layer: int) -> None:
        copy_pieces(self._device_slots[:, layer], loads[:, 1], self._host_slots[:, layer], loads[:, 0])

    def load_staged_layer(self, moves: StepTransfers, layer: int, part: NDArray[np.int64]) -> None:
        """One layer of the staged blocks that `part` indexes."""
        slots, host_blocks = moves.staging_slots[part] + layer % 2, moves.transfers.staged_blocks[part]
        copy_pieces(self._device_slots.flatten(0, 1), slots, self._host_slots[:, layer], host_blocks)

    def store(self, moves: StepTransfers) -> None:
        """Writes the step's new KV to the host, after the step's copies between host blocks."""
        staged = _of(moves, self._staging)
        if self._device.type == "cuda" and (len(moves.transfers.host_copies) or self._faults):
            torch.cuda.current_stream(self._device).synchronize()  # what the steps before stored is there
        for source, target in moves.transfers.host_copies.tolist():
            copy_bytes(self._host_slots[target], self._host_slots[source])
        if self._device.type == "cuda":
            from batchpipe.pipeline.swap.triton_copies import copy_tokens, on_gpu

            blocks, rows = (on_gpu(numbers, self._device) for numbers in (moves.host_blocks, moves.host_rows))
            copy_tokens(staged, self._host_pool, blocks, rows, to_pool=True)
            if self._faults:
                torch.cuda.current_stream(self._device).synchronize()
            return
        integers = staged.view(INTEGERS[staged.dtype.itemsize]).numpy()
        self._host_rows[moves.host_blocks, :, :, :, moves.host_rows] = integers

    def flip_bits(self, moves: StepTransfers) -> None:
        """The faults of a step that was stored."""
        for kind, step_id, number in self._faults:
            if (kind, step_id) == ("flipped", moves.step.step_id):
                self._host_rows[moves.host_blocks[number], 0, KEY, 0, moves.host_rows[number], 0] ^= 1


def copy_bytes(target: Tensor, source: Tensor) -> None:
    """uint8, contiguous, of one size. On a GPU queued on the current stream; on the CPU by the calling thread alone."""
    if target.is_cuda or source.is_cuda:
        target.copy_(source, non_blocking=True)
    else:
        np.copyto(target.numpy(), source.numpy())


def copy_pieces(targets: Tensor, to: Int32Array, sources: Tensor, of: Int32Array) -> None:
    """Piece of[i] of `sources` to place to[i] of `targets`, uint8 [N, bytes], pieces contiguous; see `copy_bytes`."""
    assert to.max(initial=0) < len(targets) and of.max(initial=0) < len(sources), "a piece of nowhere"
    on_gpu = targets.is_cuda or sources.is_cuda
    if on_gpu and targets.shape[1] < _LARGE_PIECE_BYTES:
        from batchpipe.pipeline.swap.triton_copies import copy_pieces_on_gpu

        copy_pieces_on_gpu(targets, to, sources, of)
        return
    kernel = None if on_gpu else _copy_kernel()
    if kernel is None:
        for target, source in zip(to.tolist(), of.tolist(), strict=True):
            copy_bytes(targets[target], sources[source])
        return
    target_numbers, source_numbers = to.astype(np.int64), of.astype(np.int64)
    kernel(
        targets.data_ptr(),
        target_numbers.ctypes.data,
        targets.stride(0),
        sources.data_ptr(),
        source_numbers.ctypes.data,
        sources.stride(0),
        len(target_numbers),
        targets.shape[1],
    )


@functools.cache
def _copy_kernel() -> Callable[..., None] | None:
    kernels = load_kernels()
    if kernels is None:
        return None
    kernel = kernels.batchpipe_copy_pieces
    kernel.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int64]
    kernel.restype = None
    return kernel


def _layer_slots(pool: KvPool) -> Tensor:
    """The pool's memory, uint8 [num_blocks, num_layers, bytes]."""
    return pool.data.flatten(2).view(torch.uint8)


def _of(moves: StepTransfers, buffers: list[Tensor]) -> Tensor:
    return buffers[moves.number % NUM_STAGING_BUFFERS][: len(moves.host_blocks)]
