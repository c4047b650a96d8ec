"""The copies between one stage's two tiers of KV.

To the device go whole blocks, or one layer of them after the other; to the host new tokens, by way of a staging buffer.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchpipe.execute.link import Fault, Mark, copy_bytes, copy_pieces
from batchpipe.execute.memory import NUM_STAGING_BUFFERS
from batchpipe.execute.turn import Turn
from batchpipe.kv.pool import KEY, KvPool

_INTEGERS = {2: torch.int16, 4: torch.int32}  # numpy has no bfloat16


class TierCopies:
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

    def staged(self, turn: Turn) -> Tensor:
        """[T, L, 2, Hkv, D]: the new KV of the step, for computing to fill."""
        return _of(turn, self._staging)

    def loads_of(self, turn: Turn) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The step's loads, and those that are late; all but none where no fault is asked for."""
        loads: list[tuple[int, int]] = []
        late: list[tuple[int, int]] = []
        for number, (host_block, block) in enumerate(turn.transfers.loads.tolist()):
            asked_for = {kind for kind, step_id, n in self._faults if (step_id, n) == (turn.step.step_id, number)}
            if "wrong_source" in asked_for:
                host_block = (host_block + 1) % len(self._host_slots)
            if "wrong_target" in asked_for:
                block = (block + 1) % self._num_blocks
            (late if "late" in asked_for else loads).append((host_block, block))
        return loads, late

    def load(self, loads: list[tuple[int, int]]) -> None:
        pairs = np.array(loads, np.int32)
        copy_pieces(self._device_slots.flatten(1), pairs[:, 1], self._host_slots.flatten(1), pairs[:, 0])

    def stream(self, turn: Turn, layer: int, part: NDArray[np.int64]) -> None:
        """One layer of those of the step's streamed blocks."""
        slots, streams = turn.stream_slots[part] + layer % 2, turn.transfers.streams[part]
        copy_pieces(self._device_slots.flatten(0, 1), slots, self._host_slots[:, layer], streams)

    def store(self, turn: Turn) -> None:
        """The step's new KV, and its copies of host blocks."""
        landed = _of(turn, self._landing)
        if self._landing is not self._staging:
            landed.copy_(_of(turn, self._staging), non_blocking=True)
            copied = Mark(self._device)
            copied.record()
            copied.synchronize()
        for source, target in turn.transfers.host_copies.tolist():
            copy_bytes(self._host_slots[target], self._host_slots[source])
        self._host_rows[turn.host_blocks, :, :, :, turn.host_rows] = landed.view(
            _INTEGERS[landed.dtype.itemsize]
        ).numpy()

    def spoil(self, turn: Turn) -> None:
        """Flips the bits that were asked for, after the step was stored."""
        for kind, step_id, number in self._faults:
            if (kind, step_id) == ("flipped", turn.step.step_id):
                self._host_rows[turn.host_blocks[number], 0, KEY, 0, turn.host_rows[number], 0] ^= 1


def _layer_slots(pool: KvPool) -> Tensor:
    """The pool's memory, uint8 [num_blocks, num_layers, bytes]."""
    return pool.data.flatten(2).view(torch.uint8)


def _of(turn: Turn, buffers: list[Tensor]) -> Tensor:
    return buffers[turn.number % NUM_STAGING_BUFFERS][: len(turn.host_blocks)]
