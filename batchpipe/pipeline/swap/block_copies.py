"""The copies between one stage's two tiers of KV.

To the device go whole blocks, or one layer of them after the other; to the host new tokens, by way of a staging buffer.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchpipe.kv.pool import KEY, KvPool
from batchpipe.pipeline.memory import NUM_STAGING_BUFFERS
from batchpipe.pipeline.swap.copy_engine import Fault, TransferEvent, copy_bytes, copy_pieces
from batchpipe.pipeline.swap.step_transfers import StepTransfers
from batchpipe.types import Int32Array

_INTEGERS = {2: torch.int16, 4: torch.int32}  # numpy has no bfloat16


class BlockCopies:
    """`staged` is for the computing thread, the rest for the link's."""

    def __init__(self, pool: KvPool, host_pool: KvPool, max_step_tokens: int, faults: tuple[Fault, ...]) -> None:
        self._device = pool.device
        self._num_blocks = pool.num_blocks
        self._device_slots = _layer_slots(pool)
        self._host_slots = _layer_slots(host_pool)
        self._host_rows = host_pool.data.view(_INTEGERS[pool.dtype.itemsize]).numpy()
        shape = (max_step_tokens, pool.num_layers, 2, pool.num_kv_heads, pool.head_dim)
        self._staging = [torch.zeros(shape, dtype=pool.dtype, device=pool.device) for _ in range(NUM_STAGING_BUFFERS)]
        self._landing = self._staging  # where the host reads what was staged
        if pool.device.type == "cuda":
            self._landing = [torch.zeros(shape, dtype=pool.dtype, pin_memory=True) for _ in self._staging]
        self._faults = {(one.kind, one.step_id, one.number) for one in faults}

    def staged(self, turn: StepTransfers) -> Tensor:
        """[T, L, 2, Hkv, D]: the new KV of the step, for computing to fill."""
        return _of(turn, self._staging)

    def loads_of(self, turn: StepTransfers) -> tuple[Int32Array, Int32Array]:
        """The step's loads [M, 2], and those that are late: none, where no fault is asked for."""
        loads = turn.transfers.loads.copy()
        is_late = np.zeros(len(loads), np.bool_)
        for kind, step_id, number in self._faults:
            if step_id != turn.step.step_id or number >= len(loads):
                continue
            if kind == "wrong_source":
                loads[number, 0] = (loads[number, 0] + 1) % len(self._host_slots)
            elif kind == "wrong_target":
                loads[number, 1] = (loads[number, 1] + 1) % self._num_blocks
            elif kind == "late":
                is_late[number] = True
        return loads[~is_late], loads[is_late]

    def load(self, loads: Int32Array) -> None:
        """Whole blocks [M, 2]: (host, device block)."""
        copy_pieces(self._device_slots.flatten(1), loads[:, 1], self._host_slots.flatten(1), loads[:, 0])

    def load_layer(self, loads: Int32Array, layer: int) -> None:
        copy_pieces(self._device_slots[:, layer], loads[:, 1], self._host_slots[:, layer], loads[:, 0])

    def stream(self, turn: StepTransfers, layer: int, part: NDArray[np.int64]) -> None:
        """One layer of those of the step's streamed blocks."""
        slots, streams = turn.stream_slots[part] + layer % 2, turn.transfers.streams[part]
        copy_pieces(self._device_slots.flatten(0, 1), slots, self._host_slots[:, layer], streams)

    def store(self, turn: StepTransfers) -> None:
        """The step's new KV, and its copies of host blocks."""
        landed = _of(turn, self._landing)
        if self._landing is not self._staging:
            landed.copy_(_of(turn, self._staging), non_blocking=True)
            copied = TransferEvent(self._device)
            copied.record()
            copied.synchronize()
        for source, target in turn.transfers.host_copies.tolist():
            copy_bytes(self._host_slots[target], self._host_slots[source])
        self._host_rows[turn.host_blocks, :, :, :, turn.host_rows] = landed.view(
            _INTEGERS[landed.dtype.itemsize]
        ).numpy()

    def spoil(self, turn: StepTransfers) -> None:
        """Flips the bits that were asked for, after the step was stored."""
        for kind, step_id, number in self._faults:
            if (kind, step_id) == ("flipped", turn.step.step_id):
                self._host_rows[turn.host_blocks[number], 0, KEY, 0, turn.host_rows[number], 0] ^= 1


def _layer_slots(pool: KvPool) -> Tensor:
    """The pool's memory, uint8 [num_blocks, num_layers, bytes]."""
    return pool.data.flatten(2).view(torch.uint8)


def _of(turn: StepTransfers, buffers: list[Tensor]) -> Tensor:
    return buffers[turn.number % NUM_STAGING_BUFFERS][: len(turn.host_blocks)]
