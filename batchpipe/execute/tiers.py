"""One stage's two tiers of KV: what a step brings from the host, and what it leaves there.

Steps are announced in the order they will run, ahead of that where it can be. What step j brings may begin when step
j - 2 has been computed, so it runs beside step j - 1; what it reads must have been written there by then.

    compute     │ step j-2     │ step j-1                       │ step j: layer 0, layer 1, ...
    from host                  │ loads of j, its streams' first │ layer l of the streams once l - 2 is attended
    to host                    │ new KV of j-2                  │ new KV of j-1

New KV is gathered in one of two staging buffers, by layer, as attention gets it, and spread over the host's blocks once
the step is computed. The lane from the host does first what is wanted first: an earlier step's; streams before loads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchpipe.attention.base import AttentionBackend
from batchpipe.execute.link import EmulatedLink, Lane, Link, Mark, Transfer, copy_bytes, copy_pieces
from batchpipe.execute.memory import NUM_STAGING_BUFFERS
from batchpipe.execute.turn import Turn
from batchpipe.execute.verify import ONE_IN, Verifier
from batchpipe.execute.write_through import WriteThrough
from batchpipe.kv.pool import KEY, VALUE, KvPool
from batchpipe.types import Int32Array, LinkUse, Step

# Of loads at once: they give way to streams between two such pieces.
PIECE_BYTES = 4 << 20
IntArray = NDArray[np.int64]
_INTEGERS = {2: torch.int16, 4: torch.int32}  # numpy has no bfloat16


class Tiers:
    """`announce` every step; then in the same order `begin`, the model with `backend`, `finish`. At the end `close`.

    One thread may announce while another computes.
    """

    def __init__(
        self,
        pool: KvPool,
        host_pool: KvPool,
        backend: AttentionBackend,
        *,
        stage_index: int,
        streams_per_block: int,
        max_step_tokens: int,
        kv_verify: str,
        emulated: EmulatedLink | None,
    ) -> None:
        assert 2 * streams_per_block <= pool.num_layers, "two layers of each streamed block in a block"
        self.backend = WriteThrough(backend, self._before_layer, self._after_layer)
        self._pool = pool
        self._host_pool = host_pool
        self._device_slots = _layer_slots(pool)
        self._host_slots = _layer_slots(host_pool)
        self._host_rows = host_pool.data.view(_INTEGERS[pool.dtype.itemsize]).numpy()
        self._streams_per_block = streams_per_block
        one_in = ONE_IN[kv_verify]
        self._verifier = Verifier(stage_index, pool, host_pool.num_blocks, one_in) if one_in else None
        self._faults = {(one.kind, one.step_id, one.number) for one in (emulated.faults if emulated else ())}
        shape = (max_step_tokens, pool.num_layers, 2, pool.num_kv_heads, pool.head_dim)
        self._staging = [torch.zeros(shape, dtype=pool.dtype, device=pool.device) for _ in range(NUM_STAGING_BUFFERS)]
        self._landing = self._staging  # where the host reads what was staged
        if pool.device.type == "cuda":
            self._landing = [torch.zeros(shape, dtype=pool.dtype, pin_memory=True) for _ in self._staging]
        self._turns: dict[int, Turn] = {}  # announced and not computed, and the last two that are
        self._num_announced = 0
        self._num_computed = 0
        self._last_writers = np.full(host_pool.num_blocks, -1, np.int64)  # by host block, the number of a turn
        self._spans: deque[tuple[int, str, Mark, Mark]] = deque()  # number of a turn, field of LinkUse, from, until
        self._link = Link(pool.device, emulated)

    def announce(self, step: Step) -> None:
        """Queues all that the step moves; it begins as soon as it may."""
        turn = Turn.of(step, self._num_announced, self._pool, self._streams_per_block, self._link)
        self._num_announced += 1
        transfers = turn.transfers
        before = self._turns.get(turn.number - 2)
        after = [] if before is None else [before.computed]
        writers = self._last_writers[transfers.streams]
        recent = writers >= turn.number - 1
        streams = [
            (part, after + self._stored(writers[part])) for part in (np.flatnonzero(~recent), np.flatnonzero(recent))
        ]
        after_loads = after + self._stored(self._last_writers[transfers.loads[:, 0]])
        self._last_writers[turn.host_blocks] = turn.number
        self._last_writers[transfers.host_copies[:, 1]] = turn.number
        self._turns[turn.number] = turn
        self._queue_streams(turn, [(part, marks) for part, marks in streams if len(part)])
        self._queue_loads(turn, after_loads)
        self._queue(
            turn, self._link.stores, partial(self._store, turn), turn.stored_bytes, [turn.computed], turn.stored
        )

    def begin(self, step: Step) -> Int32Array | None:
        """Waits until the step can be computed; `AttentionInputs.stream_slots` where blocks of it are streamed."""
        turn = self._turns[self._num_computed]
        assert turn.step is step, "a step runs out of turn"
        staged_before = self._turns.get(turn.number - NUM_STAGING_BUFFERS)
        for mark in [*turn.loaded, *([] if staged_before is None else [staged_before.stored])]:
            self._wait(turn, mark)
        if self._verifier is not None:
            self._verifier.look_at_loads(turn.transfers)
        return turn.stream_slots if len(turn.stream_slots) else None

    def finish(self) -> tuple[LinkUse, dict[int, str]]:
        """After the model: lets go what was computed. What the link did for the step, and who met wrong KV.

        The times of stores, and on a GPU of all that it has not come to, count with the step that finishes next after.
        """
        turn = self._turns[self._num_computed]
        if self._verifier is not None:
            turn.checks = self._verifier.stage(self._staged(turn, self._staging), turn.host_blocks)
            if self._verifier.looks_at_reads:
                if (before := self._turns.get(turn.number - 1)) is not None:
                    self._link.wait(before.stored)
                self._verifier.look_at_reads(turn.step, turn.transfers)
        self._link.set(turn.computed)
        self._turns.pop(turn.number - NUM_STAGING_BUFFERS, None)
        self._num_computed += 1
        corrupt = {} if self._verifier is None else self._verifier.corrupt(turn.step, turn.transfers, turn.stream_units)
        return self._use(turn), corrupt

    def close(self) -> None:
        """Ends the threads; what is under way is given up."""
        self._link.close()
        if self._pool.device.type == "cuda":
            torch.cuda.synchronize(self._pool.device)
            self._host_pool.unpin()

    # -- by the computing thread -----------------------------------------------------------------------------------

    def _stored(self, writers: NDArray[np.int64]) -> list[Mark]:
        """When all that these turns wrote is on the host: the last one's is stored last, and older ones' has been."""
        writer = self._turns.get(int(writers.max(initial=-1)))
        return [] if writer is None else [writer.stored]

    def _queue_streams(self, turn: Turn, parts: list[tuple[IntArray, list[Mark]]]) -> None:
        """parts: indices of streamed blocks, and what their first layers wait for; the last part's waits for most.

        Most blocks are as the step before found them, so their first layers need not wait for its end.
        """
        everything = np.arange(len(turn.stream_slots))
        for layer, arrived in enumerate(turn.arrived):
            todo = parts if layer < 2 else [(everything, [turn.attended[layer - 2]])]
            for number, (part, after) in enumerate(todo, 1):
                work = partial(self._stream, turn, layer, part)
                num_bytes = len(part) * self._pool.bytes_per_block // self._pool.num_layers
                done = arrived if number == len(todo) else self._link.mark()
                self._queue(turn, self._link.loads, work, num_bytes, after, done, patient=False)

    def _queue_loads(self, turn: Turn, after: list[Mark]) -> None:
        loads, late = self._with_faults(turn)
        num_blocks = max(1, PIECE_BYTES // self._pool.bytes_per_block)
        for first in range(0, len(loads), num_blocks):
            turn.loaded.append(self._link.mark())
            self._queue_load(turn, loads[first : first + num_blocks], after, turn.loaded[-1])
        if late:
            self._queue_load(turn, late, [turn.computed], self._link.mark())

    def _queue_load(self, turn: Turn, loads: list[tuple[int, int]], after: list[Mark], done: Mark) -> None:
        num_bytes = len(loads) * self._pool.bytes_per_block
        self._queue(turn, self._link.loads, partial(self._load, loads), num_bytes, after, done)

    def _queue(
        self,
        turn: Turn,
        lane: Lane,
        work: Callable[[], None],
        num_bytes: int,
        after: list[Mark],
        done: Mark,
        *,
        patient: bool = True,
    ) -> None:
        begun = self._link.mark()
        name = "load_seconds" if lane is self._link.loads else "store_seconds"
        self._spans.append((turn.number, name, begun, done))
        lane.put(Transfer(work, num_bytes, after, begun, done, patient), (turn.number, int(patient)))

    def _before_layer(self, layer: int, key: Tensor, value: Tensor) -> None:
        turn = self._turns[self._num_computed]
        if turn.arrived:
            self._wait(turn, turn.arrived[layer])
            if self._verifier is not None:
                self._verifier.look_at_streams(layer, turn.transfers.streams, turn.stream_slots + layer % 2)
        staged = self._staged(turn, self._staging)
        staged[:, layer, KEY] = key
        staged[:, layer, VALUE] = value

    def _after_layer(self, layer: int) -> None:
        turn = self._turns[self._num_computed]
        if turn.attended:
            self._link.set(turn.attended[layer])

    def _staged(self, turn: Turn, buffers: list[Tensor]) -> Tensor:
        """[T, L, 2, Hkv, D] of the step."""
        return buffers[turn.number % NUM_STAGING_BUFFERS][: len(turn.host_blocks)]

    def _wait(self, turn: Turn, mark: Mark) -> None:
        if mark.is_reached:  # no stall, be it as short as looking takes
            self._link.wait(mark)
            return
        begun, ended = self._link.mark(), self._link.mark()
        begun.record()
        self._link.wait(mark)
        ended.record()
        self._spans.append((turn.number, "stall_seconds", begun, ended))

    def _use(self, turn: Turn) -> LinkUse:
        seconds = dict.fromkeys(("stall_seconds", "load_seconds", "store_seconds"), 0.0)
        for _ in range(len(self._spans)):
            number, name, begun, ended = self._spans.popleft()
            if number <= turn.number and ended.is_reached:
                seconds[name] += ended.seconds_since(begun)
            else:
                self._spans.append((number, name, begun, ended))
        return LinkUse(loaded_bytes=turn.loaded_bytes, stored_bytes=turn.stored_bytes, **seconds)

    def _with_faults(self, turn: Turn) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The step's loads, and those that are late; all but none where no fault is asked for."""
        loads: list[tuple[int, int]] = []
        late: list[tuple[int, int]] = []
        for number, (host_block, block) in enumerate(turn.transfers.loads.tolist()):
            asked_for = {kind for kind, step_id, n in self._faults if (step_id, n) == (turn.step.step_id, number)}
            if "wrong_source" in asked_for:
                host_block = (host_block + 1) % self._host_pool.num_blocks
            if "wrong_target" in asked_for:
                block = (block + 1) % self._pool.num_blocks
            (late if "late" in asked_for else loads).append((host_block, block))
        return loads, late

    # -- by the threads of the link --------------------------------------------------------------------------------

    def _load(self, loads: list[tuple[int, int]]) -> None:
        pairs = np.array(loads, np.int32)
        copy_pieces(self._device_slots.flatten(1), pairs[:, 1], self._host_slots.flatten(1), pairs[:, 0])

    def _stream(self, turn: Turn, layer: int, part: IntArray) -> None:
        slots, streams = turn.stream_slots[part] + layer % 2, turn.transfers.streams[part]
        copy_pieces(self._device_slots.flatten(0, 1), slots, self._host_slots[:, layer], streams)

    def _store(self, turn: Turn) -> None:
        landed = self._staged(turn, self._landing)
        if self._landing is not self._staging:
            landed.copy_(self._staged(turn, self._staging), non_blocking=True)
            copied = self._link.mark()
            copied.record()
            copied.synchronize()
        for source, target in turn.transfers.host_copies.tolist():
            copy_bytes(self._host_slots[target], self._host_slots[source])
        rows = landed.view(_INTEGERS[landed.dtype.itemsize]).numpy()
        self._host_rows[turn.host_blocks, :, :, :, turn.host_rows] = rows
        if self._verifier is not None:
            assert turn.checks is not None
            self._verifier.keep(turn.host_blocks, turn.host_rows, turn.checks, turn.transfers.host_copies)
        for kind, step_id, number in self._faults:
            if (kind, step_id) == ("flipped", turn.step.step_id):
                self._host_rows[turn.host_blocks[number], 0, KEY, 0, turn.host_rows[number], 0] ^= 1


def _layer_slots(pool: KvPool) -> Tensor:
    """The pool's memory, uint8 [num_blocks, num_layers, bytes]."""
    return pool.data.flatten(2).view(torch.uint8)
