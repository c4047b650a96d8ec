"""One stage's two tiers of KV: what a step brings from the host, and what it leaves there.

Steps are announced in the order they will run, ahead of that where it can be. What step j brings may begin when step
j - 2 has been computed, so it runs beside step j - 1; what it reads must have been written there by then.

    compute     │ step j-2     │ step j-1                       │ step j: layer 0, layer 1, ...
    from host                  │ loads of j, its streams' first │ layer l of the streams once l - 2 is attended
    to host                    │ new KV of j-2                  │ new KV of j-1

Where nothing computes any more when step j is announced, its loads come layer by layer, too, beside its own computing.
New KV is gathered in one of two staging buffers, by layer, as attention gets it, and spread over the host's blocks once
the step is computed. The lane from the host does first what is wanted first: an earlier step's; streams before loads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchpipe.attention.base import AttentionBackend
from batchpipe.kv.layout import STAGED_LAYERS
from batchpipe.kv.pool import KEY, VALUE, KvPool
from batchpipe.pipeline.memory import NUM_STAGING_BUFFERS
from batchpipe.pipeline.swap.block_copies import BlockCopies
from batchpipe.pipeline.swap.copy_engine import EmulatedLink, Link, Transfer, TransferEvent
from batchpipe.pipeline.swap.kv_capture import KvCapture
from batchpipe.pipeline.swap.step_transfers import StepTransfers
from batchpipe.pipeline.swap.verify import ONE_IN, Verifier
from batchpipe.types import Int32Array, LinkUse, Step

# Of loads at once: they give way to streams between two such pieces.
PIECE_BYTES = 4 << 20
IntArray = NDArray[np.int64]


class KvSwapper:
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
        assert STAGED_LAYERS * streams_per_block <= pool.num_layers, "more streams than a block has room for"
        self.backend = KvCapture(backend, self._before_layer, self._after_layer)
        self._pool = pool
        self._host_pool = host_pool
        self._layer_bytes = pool.bytes_per_block // pool.num_layers
        self._streams_per_block = streams_per_block
        one_in = ONE_IN[kv_verify]
        self._verifier = Verifier(stage_index, pool, host_pool.num_blocks, one_in) if one_in else None
        self._copies = BlockCopies(pool, host_pool, max_step_tokens, emulated.faults if emulated else ())
        self._turns: dict[int, StepTransfers] = {}  # announced and not computed, and the last two that are
        self._num_announced = 0
        self._num_computed = 0
        self._last_writers = np.full(host_pool.num_blocks, -1, np.int64)  # by host block, the number of a turn
        self._spans: deque[tuple[int, str, TransferEvent, TransferEvent]] = (
            deque()
        )  # number of a turn, field of LinkUse, from, until
        self._link = Link(pool.device, emulated)

    def announce(self, step: Step) -> None:
        """Queues all that the step moves; it begins as soon as it may."""
        is_alone = self._num_computed == self._num_announced
        number, units = self._num_announced, self._streams_per_block
        turn = StepTransfers.of(step, number, self._pool, units, self._link, is_alone=is_alone)
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
        streamed = self._streams(turn, [(part, marks) for part, marks in streams if len(part)])
        self._link.loads.put([*streamed, *self._loads(turn, after_loads)])
        self._link.stores.put([self._store_of(turn)])

    def begin(self, step: Step) -> Int32Array | None:
        """Waits until the step can be computed. Returns `AttentionInputs.staging_slots` if blocks of it are staged."""
        turn = self._turns[self._num_computed]
        assert turn.step is step, "a step runs out of turn"
        staged_before = self._turns.get(turn.number - NUM_STAGING_BUFFERS)
        loaded = [] if turn.loads_by_layer else turn.loaded
        for mark in [*loaded, *([] if staged_before is None else [staged_before.stored])]:
            self._wait(turn, mark)
        if self._verifier is not None:
            self._verifier.begin(turn.transfers, loads_by_layer=turn.loads_by_layer)
        if not len(turn.stream_slots):
            return None
        streams = step.block_tables - self._pool.num_blocks
        return np.where(streams >= 0, turn.stream_slots[np.maximum(streams, 0)], np.int32(-1))

    def finish(self) -> tuple[LinkUse, dict[int, str]]:
        """After the model: lets go what was computed. What the link did for the step, and who met wrong KV.

        The times of stores, and on a GPU of all that it has not come to, count with the step that finishes next after.
        """
        turn = self._turns[self._num_computed]
        if self._verifier is not None:
            turn.checks = self._verifier.stage(self._copies.staged(turn), turn.host_blocks)
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

    def _stored(self, writers: NDArray[np.int64]) -> list[TransferEvent]:
        """When all that these turns wrote is on the host: the last one's is stored last, and older ones' has been."""
        writer = self._turns.get(int(writers.max(initial=-1)))
        return [] if writer is None else [writer.stored]

    def _streams(self, turn: StepTransfers, parts: list[tuple[IntArray, list[TransferEvent]]]) -> Iterator[Transfer]:
        """parts: indices of streamed blocks, and what their first layers wait for; the last part's waits for most.

        Most blocks are as the step before found them, so their first layers need not wait for its end.
        """
        everything = np.arange(len(turn.stream_slots))
        for layer, arrived in enumerate(turn.arrived):
            todo = parts if layer < 2 else [(everything, [turn.attended[layer - 2]])]
            for number, (part, after) in enumerate(todo, 1):
                work = partial(self._copies.stream, turn, layer, part)
                done = arrived if number == len(todo) else self._link.mark()
                yield self._load_of(turn, work, len(part) * self._layer_bytes, after, done, patient=False)

    def _loads(self, turn: StepTransfers, after: list[TransferEvent]) -> Iterator[Transfer]:
        loads, late = self._copies.loads_of(turn)
        block_bytes = self._pool.bytes_per_block
        if turn.loads_by_layer:
            for layer in range(self._pool.num_layers):
                turn.loaded.append(self._link.mark())
                work = partial(self._copies.load_layer, loads, layer)
                yield self._load_of(turn, work, len(loads) * self._layer_bytes, after, turn.loaded[-1])
        else:
            num_blocks = max(1, PIECE_BYTES // block_bytes)
            for first in range(0, len(loads), num_blocks):
                turn.loaded.append(self._link.mark())
                part = loads[first : first + num_blocks]
                work = partial(self._copies.load, part)
                yield self._load_of(turn, work, len(part) * block_bytes, after, turn.loaded[-1])
        if len(late):
            work, done = partial(self._copies.load, late), self._link.mark()
            yield self._load_of(turn, work, len(late) * block_bytes, [turn.computed], done)

    def _load_of(
        self,
        turn: StepTransfers,
        work: Callable[[], None],
        num_bytes: int,
        after: list[TransferEvent],
        done: TransferEvent,
        *,
        patient: bool = True,
    ) -> Transfer:
        begun = self._link.mark()
        self._spans.append((turn.number, "load_seconds", begun, done))
        return Transfer(work, num_bytes, after, begun, done, (turn.number, int(patient)), patient)

    def _store_of(self, turn: StepTransfers) -> Transfer:
        begun = self._link.mark()
        self._spans.append((turn.number, "store_seconds", begun, turn.stored))
        work = partial(self._store, turn)
        return Transfer(work, turn.stored_bytes, [turn.computed], begun, turn.stored, (turn.number,))

    def _before_layer(self, layer: int, key: Tensor, value: Tensor) -> None:
        turn = self._turns[self._num_computed]
        marks = [turn.arrived[layer]] if turn.arrived else []
        if turn.loads_by_layer:
            marks.append(turn.loaded[layer])
        for mark in marks:
            self._wait(turn, mark)
        if self._verifier is not None and marks:
            self._verifier.look_at_layer(layer, turn.transfers, turn.stream_slots)
        staged = self._copies.staged(turn)
        staged[:, layer, KEY] = key
        staged[:, layer, VALUE] = value

    def _after_layer(self, layer: int) -> None:
        turn = self._turns[self._num_computed]
        if turn.attended:
            self._link.set(turn.attended[layer])

    def _wait(self, turn: StepTransfers, mark: TransferEvent) -> None:
        if mark.is_reached:  # no stall, be it as short as looking takes
            return
        begun, ended = self._link.mark(), self._link.mark()
        begun.record()
        self._link.wait(mark)
        ended.record()
        self._spans.append((turn.number, "stall_seconds", begun, ended))

    def _use(self, turn: StepTransfers) -> LinkUse:
        seconds = dict.fromkeys(("stall_seconds", "load_seconds", "store_seconds"), 0.0)
        for _ in range(len(self._spans)):
            number, name, begun, ended = self._spans.popleft()
            if number <= turn.number and ended.is_reached:
                seconds[name] += ended.seconds_since(begun)
            else:
                self._spans.append((number, name, begun, ended))
        return LinkUse(loaded_bytes=turn.loaded_bytes, stored_bytes=turn.stored_bytes, **seconds)

    # -- by a thread of the link -----------------------------------------------------------------------------------

    def _store(self, turn: StepTransfers) -> None:
        self._copies.store(turn)
        if self._verifier is not None:
            assert turn.checks is not None
            self._verifier.keep(turn.host_blocks, turn.host_rows, turn.checks, turn.transfers.host_copies)
        self._copies.spoil(turn)
