"""One stage's two tiers of KV: what a step swaps in from the host, and what it writes back.

Steps are announced in the order in which they will run, as early as they are known. What step j swaps in may be copied
once step j - 2 is computed, so it is copied beside step j - 1; what it reads on the host must be written by then.

    compute    │ step j-2     │ step j-1                               │ step j: layer 0, layer 1, ...
    from host                 │ whole blocks of j, first staged layers │ layer l of staged blocks once l - 2 is attended
    to host                   │ new KV of j-2                          │ new KV of j-1

If nothing is computed any more when step j is announced, its whole blocks come layer by layer, too, beside its own
computing. New KV is gathered layer by layer in one of two staging buffers, as attention gets it, and spread over the
host's blocks once the step is computed. From the host an earlier step's copies go first, and staged layers before whole
blocks.
"""

from __future__ import annotations

import logging
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

logger = logging.getLogger(__name__)

# The most that is loaded at once: staged layers go ahead of the next such piece.
PIECE_BYTES = 4 << 20
IntArray = NDArray[np.int64]


class KvSwapper:
    """`announce` every step; then in the same order `begin`, the model with `backend`, `finish`. At the end `close`.

    One thread may announce while another computes; two copy engines' threads run transfers. No lock is taken for what
    they share, because every value has one writer or survives a late reader:

    - `_last_writers` and `_num_announced` are the announcing thread's. `_num_computed` is the computing thread's; the
      announcing one may read the number before the last, and then takes a step to be in flight that is not any more.
    - `_moves` is filled by the announcing thread and emptied by the computing one, one entry at a time. The entry of
      step j - 2 goes at the end of step j, so it is there when j is announced and when j begins. An older entry that
      is looked for and gone has been stored: step j began only once j - 2 was.
    - `_spans` gets entries from both threads and loses them to the computing one, from the other end.
    - Copy engines see only the `StepTransfers` of their transfers, after the events that they wait for.

    The single operations on the dictionary and the deque are atomic in CPython.
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
        assert STAGED_LAYERS * streams_per_block <= pool.num_layers, "more staged blocks than a block has slots for"
        self._backend = backend
        self._captured = KvCapture(backend, self._before_layer, self._after_layer)
        self._pool = pool
        self._host_pool = host_pool
        self._layer_bytes = pool.bytes_per_block // pool.num_layers
        self._streams_per_block = streams_per_block
        one_in = ONE_IN[kv_verify]
        self._verifier = Verifier(stage_index, pool, host_pool.num_blocks, one_in) if one_in else None
        self._copies = BlockCopies(pool, host_pool, max_step_tokens, emulated.faults if emulated else ())
        self._moves: dict[int, StepTransfers] = {}  # by step number: steps to be computed, and the two before them
        self._num_announced = 0
        self._num_computed = 0
        self._last_writers = np.full(host_pool.num_blocks, -1, np.int64)  # by host block, the number of a step
        # Number of a step, field of LinkUse, from, until.
        self._spans: deque[tuple[int, str, TransferEvent, TransferEvent]] = deque()
        self._link = Link(pool.device, emulated)

    def announce(self, step: Step) -> None:
        """Queues all that the step moves; each transfer begins as soon as it may."""
        number = self._num_announced
        is_alone = self._num_computed == number
        moves = StepTransfers.of(step, number, self._pool, self._streams_per_block, self._link, is_alone=is_alone)
        self._num_announced += 1
        transfers = moves.transfers
        before = self._moves.get(number - 2)
        after = [] if before is None else [before.computed]
        writers = self._last_writers[transfers.staged_blocks]
        recent = writers >= number - 1
        parts = [(part, after + self._stored(writers[part])) for part in map(np.flatnonzero, (~recent, recent))]
        after_loads = after + self._stored(self._last_writers[transfers.loads[:, 0]])
        self._last_writers[moves.host_blocks] = number
        self._last_writers[transfers.host_copies[:, 1]] = number
        self._moves[number] = moves
        staged = self._staged_layers(moves, [(part, events) for part, events in parts if len(part)])
        self._link.loads.put([*staged, *self._loads(moves, after_loads)])
        self._link.stores.put([self._store_of(moves)])

    def begin(self, step: Step) -> Int32Array | None:
        """Waits until the step can be computed. Returns `AttentionInputs.staging_slots` if blocks of it are staged."""
        moves = self._moves[self._num_computed]
        assert moves.step is step, "a step runs out of turn"
        staged_before = self._moves.get(moves.number - NUM_STAGING_BUFFERS)
        loaded = [] if moves.loads_by_layer else moves.loaded
        for event in [*loaded, *([] if staged_before is None else [staged_before.stored])]:
            self._wait(moves, event)
        if self._verifier is not None:
            self._verifier.begin(moves.transfers, loads_by_layer=moves.loads_by_layer)
        if not len(moves.staging_slots):
            return None
        slots = moves.transfers.staging_tables
        return np.where(slots < 0, np.int32(-1), moves.staging_slots[slots])

    @property
    def backend(self) -> AttentionBackend:
        """What the step that has begun computes with. Where all its KV is in a GPU's pool, no layer is looked at."""
        moves = self._moves[self._num_computed]
        return self._captured if self._looks_at_layers(moves) else self._backend

    def _looks_at_layers(self, moves: StepTransfers) -> bool:
        on_gpu = self._pool.device.type == "cuda"
        return not on_gpu or moves.loads_by_layer or bool(moves.arrived) or self._backend.name != "triton"

    def finish(self) -> tuple[LinkUse, dict[int, str]]:
        """Call after the model ran. Returns (link use of this step, {sequence id: what is wrong with its KV}).

        The times of write-backs, and on a GPU of all that it has not reached, count with a later step.
        """
        moves = self._moves[self._num_computed]
        if not self._looks_at_layers(moves):
            self._copies.stage(moves)
        if self._verifier is not None:
            moves.checks = self._verifier.stage(self._copies.staging_of(moves), moves.host_blocks)
            if self._verifier.checks_reads:
                if (before := self._moves.get(moves.number - 1)) is not None:
                    self._link.wait(before.stored)
                self._verifier.check_reads(moves.step, moves.transfers)
        self._link.record(moves.computed)
        self._moves.pop(moves.number - NUM_STAGING_BUFFERS, None)
        self._num_computed += 1
        corrupt = {} if self._verifier is None else self._verifier.corrupt(moves)
        return self._use(moves), corrupt

    def close(self) -> None:
        """Ends the threads; transfers that have not begun are dropped."""
        if not self._link.close():
            # Its memory must stay as it is. An error here would hide the one that led here.
            logger.error("a copy thread does not end; the host memory for KV stays pinned")
        elif self._pool.device.type == "cuda":
            torch.cuda.synchronize(self._pool.device)
            self._host_pool.unpin()

    # -- by the announcing thread ----------------------------------------------------------------------------------

    def _stored(self, writers: NDArray[np.int64]) -> list[TransferEvent]:
        """After this all that these steps wrote is on the host: the last one's is stored last."""
        writer = self._moves.get(int(writers.max(initial=-1)))
        return [] if writer is None else [writer.stored]

    def _staged_layers(
        self, moves: StepTransfers, parts: list[tuple[IntArray, list[TransferEvent]]]
    ) -> Iterator[Transfer]:
        """parts: indices of staged blocks, and the events that their first layers wait for; the last waits longest.

        Most blocks are as the step before found them, so their first layers need not wait for its end.
        """
        everything = np.arange(len(moves.staging_slots))
        for layer, arrived in enumerate(moves.arrived):
            todo = parts if layer < 2 else [(everything, [moves.attended[layer - 2]])]
            for number, (part, after) in enumerate(todo, 1):
                work = partial(self._copies.load_staged_layer, moves, layer, part)
                done = arrived if number == len(todo) else self._link.new_event()
                yield self._load_of(moves, work, len(part) * self._layer_bytes, after, done, patient=False)

    def _loads(self, moves: StepTransfers, after: list[TransferEvent]) -> Iterator[Transfer]:
        loads, late = self._copies.loads_of(moves)
        block_bytes, layers = self._pool.bytes_per_block, range(self._pool.num_layers)
        if moves.loads_by_layer:
            works = [partial(self._copies.load_layer, loads, layer) for layer in layers]
            sizes = [len(loads) * self._layer_bytes for _ in layers]
        else:
            num_blocks = max(1, PIECE_BYTES // block_bytes)
            parts = [loads[first : first + num_blocks] for first in range(0, len(loads), num_blocks)]
            works = [partial(self._copies.load, part) for part in parts]
            sizes = [len(part) * block_bytes for part in parts]
        moves.loaded.extend(self._link.new_event() for _ in works)
        for work, num_bytes, done in zip(works, sizes, moves.loaded, strict=True):
            yield self._load_of(moves, work, num_bytes, after, done)
        if len(late):
            work, done = partial(self._copies.load, late), self._link.new_event()
            yield self._load_of(moves, work, len(late) * block_bytes, [moves.computed], done)

    def _load_of(
        self,
        moves: StepTransfers,
        work: Callable[[], None],
        num_bytes: int,
        after: list[TransferEvent],
        done: TransferEvent,
        *,
        patient: bool = True,
    ) -> Transfer:
        begun = self._link.new_event()
        self._spans.append((moves.number, "load_seconds", begun, done))
        return Transfer(work, num_bytes, after, begun, done, (moves.number, int(patient)), patient)

    def _store_of(self, moves: StepTransfers) -> Transfer:
        begun = self._link.new_event()
        self._spans.append((moves.number, "store_seconds", begun, moves.stored))
        work = partial(self._store, moves)
        return Transfer(work, moves.stored_bytes, [moves.computed], begun, moves.stored, (moves.number,))

    # -- by the computing thread -----------------------------------------------------------------------------------

    def _before_layer(self, layer: int, key: Tensor, value: Tensor) -> None:
        moves = self._moves[self._num_computed]
        events = [moves.arrived[layer]] if moves.arrived else []
        if moves.loads_by_layer:
            events.append(moves.loaded[layer])
        for event in events:
            self._wait(moves, event)
        if self._verifier is not None and events:
            self._verifier.check_layer(layer, moves)
        staging = self._copies.staging_of(moves)
        staging[:, layer, KEY] = key
        staging[:, layer, VALUE] = value

    def _after_layer(self, layer: int) -> None:
        moves = self._moves[self._num_computed]
        if moves.attended:
            self._link.record(moves.attended[layer])

    def _wait(self, moves: StepTransfers, event: TransferEvent) -> None:
        if event.is_reached:  # no stall: the time that looking takes would add up over the layers
            return
        begun, ended = self._link.new_event(), self._link.new_event()
        begun.record()
        self._link.wait(event)
        ended.record()
        self._spans.append((moves.number, "stall_seconds", begun, ended))

    def _use(self, moves: StepTransfers) -> LinkUse:
        seconds = dict.fromkeys(("stall_seconds", "load_seconds", "store_seconds"), 0.0)
        for _ in range(len(self._spans)):
            number, name, begun, ended = self._spans.popleft()
            if number <= moves.number and ended.is_reached:
                seconds[name] += ended.seconds_since(begun)
            else:
                self._spans.append((number, name, begun, ended))
        return LinkUse(loaded_bytes=moves.loaded_bytes, stored_bytes=moves.stored_bytes, **seconds)

    # -- by a copy engine's thread ---------------------------------------------------------------------------------

    def _store(self, moves: StepTransfers) -> None:
        self._copies.store(moves)
        if self._verifier is not None:
            assert moves.checks is not None
            self._verifier.keep(moves.host_blocks, moves.host_rows, moves.checks, moves.transfers.host_copies)
        self._copies.flip_bits(moves)
