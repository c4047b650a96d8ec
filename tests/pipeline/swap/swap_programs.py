"""Random programs of steps between two tiers: whoever runs, whatever was evicted, loaded, streamed or copied before.

They keep what a scheduler promises (see `batchpipe.types.Transfers`) and feed given tokens, so that they do not
depend on results. `on_the_device` is the same step with all KV on the device: the host's block tables name device
blocks then.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from batchpipe.types import SequenceStart, Step, Transfers
from tests.scheduler.scheduler_cases import sampling

BLOCK_TOKENS = 4
NUM_BLOCKS, NUM_HOST_BLOCKS = 16, 160
MAX_STEP_BLOCKS = NUM_BLOCKS // 2  # so that the step after it finds blocks that it did not use
MAX_STEP_TOKENS = 24
MAX_TOKENS = 7 * BLOCK_TOKENS


def on_the_device(step: Step) -> Step:
    transfers = step.transfers
    assert transfers is not None
    return replace(step, block_tables=transfers.host_tables, copied_blocks=transfers.host_copies, transfers=None)


@dataclass
class Alive:
    """A sequence and the tokens it is fed. is_new: no step has had it."""

    sequence_id: int
    tokens: np.ndarray
    num_done: int = 0
    host_blocks: list[int] = field(default_factory=list)
    last_step: int = -9
    is_new: bool = True


@dataclass
class Plan:
    """A step being made. rows: sequence, context, new tokens, (device block, staging slot) of each block."""

    number: int
    rows: list[tuple[Alive, int, int, list[tuple[int, int]]]] = field(default_factory=list)
    loads: list[tuple[int, int]] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    units: list[int] = field(default_factory=list)
    host_copies: list[tuple[int, int]] = field(default_factory=list)
    device_copies: list[tuple[int, int]] = field(default_factory=list)


class Program:
    """`next_step` in order. max_batches: so many steps may be in flight; modes: how blocks come (load, stream)."""

    def __init__(self, seed: int, max_batches: int, streams_per_block: int, modes: tuple[str, ...]) -> None:
        self.random = np.random.default_rng(seed)
        self.max_batches = max_batches
        self.streams_per_block = streams_per_block
        self.modes = modes
        self.alive: list[Alive] = []
        self.free_host_blocks: list[int] = self.random.permutation(NUM_HOST_BLOCKS).tolist()
        self.places: dict[int, int] = {}  # host block -> device block
        self.last_used = np.full(NUM_BLOCKS, -9)  # by device block, the number of a step
        self.num_steps = self.num_sequences = 0

    def next_step(self) -> Step:
        self.plan = Plan(self.num_steps)
        self.num_steps += 1
        self.places = {h: place for h, place in self.places.items() if self.random.random() < 0.7}
        released = self._release()
        while len(self.alive) < 5 * self.max_batches:
            tokens = self.random.integers(0, 256, int(self.random.integers(5, MAX_TOKENS))).astype(np.int32)
            self.alive.append(Alive(self.num_sequences, tokens))
            self.num_sequences += 1
        free = [one for one in self.alive if self._is_free(one) and one.num_done < len(one.tokens)]
        for index in self.random.permutation(len(free))[:4]:
            self._try(free[index])
        assert self.plan.rows
        return self._step(released)

    def _is_free(self, one: Alive) -> bool:
        """Not in flight."""
        return one.last_step <= self.plan.number - self.max_batches

    def _release(self) -> tuple[int, ...]:
        ended = [one for one in self.alive if one.num_done == len(one.tokens) and self._is_free(one)]
        for one in ended:
            self.alive.remove(one)
            for host_block in one.host_blocks:
                self.places.pop(host_block, None)
            self.free_host_blocks = one.host_blocks + self.free_host_blocks
        return tuple(one.sequence_id for one in ended)

    def _try(self, one: Alive) -> None:
        num_left = MAX_STEP_TOKENS - sum(tokens for _, _, tokens, _ in self.plan.rows)
        if num_left < 1:
            return
        if one.is_new and not one.host_blocks:
            self._fork(one)
        num_tokens = int(self.random.integers(1, min(6, len(one.tokens) - one.num_done, num_left) + 1))
        width = -(-(one.num_done + num_tokens) // BLOCK_TOKENS)
        while len(one.host_blocks) < width:
            one.host_blocks.append(self.free_host_blocks.pop())
        table = []
        for column in range(width):
            place = self._bring(one.host_blocks[column], is_new=column * BLOCK_TOKENS >= one.num_done)
            if place is None:
                assert one.num_done == 0 or not one.is_new, "a fork has room"
                return
            table.append(place)
        self.plan.rows.append((one, one.num_done, num_tokens, table))
        one.num_done, one.last_step = one.num_done + num_tokens, self.plan.number

    def _fork(self, one: Alive) -> None:
        """Sometimes: begins with a copy of the first block of another, as far as that one has come."""
        plan = self.plan
        donors = [
            other
            for other in self.alive
            if other.num_done and other.last_step < plan.number and other.host_blocks[0] in self.places
        ]
        if not donors or plan.host_copies or self._num_used() > MAX_STEP_BLOCKS - 5:
            return
        donor = donors[int(self.random.integers(len(donors)))]
        source = self.places[donor.host_blocks[0]]
        self.last_used[source] = plan.number
        target = self._take(cold=False)
        assert target is not None
        one.num_done = min(donor.num_done, BLOCK_TOKENS, len(one.tokens) - 1)
        one.tokens[: one.num_done] = donor.tokens[: one.num_done]
        one.host_blocks.append(self.free_host_blocks.pop())
        self.places[one.host_blocks[0]] = target
        plan.host_copies.append((donor.host_blocks[0], one.host_blocks[0]))
        plan.device_copies.append((source, target))

    def _bring(self, host_block: int, *, is_new: bool) -> tuple[int, int] | None:
        """Its device block and -1, or 0 and its staging slot; None: no room."""
        place = self.places.get(host_block)
        if place is not None:
            if self.last_used[place] < self.plan.number and self._num_used() == MAX_STEP_BLOCKS:
                return None
            self.last_used[place] = self.plan.number
            return place, -1
        if self.random.choice(self.modes) == "stream" and not (is_new and self.random.random() < 0.5):
            return self._stream(host_block)
        place = self._take(cold=not is_new)
        if place is None:
            return None
        self.places[host_block] = place
        if not is_new:
            self.plan.loads.append((host_block, place))
        return place, -1

    def _stream(self, host_block: int) -> tuple[int, int] | None:
        streams, units = self.plan.streams, self.plan.units
        if len(streams) == len(units) * self.streams_per_block:
            unit = self._take(cold=True)
            if unit is None:
                return None
            units.append(unit)
        streams.append(host_block)
        return 0, len(streams) - 1

    def _num_used(self) -> int:
        return int((self.last_used == self.plan.number).sum())

    def _take(self, *, cold: bool) -> int | None:
        """A device block that this step does not use yet, cold: nor one in flight; evicts whose it was."""
        # With one batch nothing is in flight where a step is made.
        until = self.plan.number - (1 if self.max_batches == 1 or not cold else 2)
        blocks = np.flatnonzero(self.last_used <= until)
        if self._num_used() == MAX_STEP_BLOCKS or not len(blocks):
            return None
        block = int(self.random.choice(blocks))
        self.places = {h: place for h, place in self.places.items() if place != block}
        self.last_used[block] = self.plan.number
        return block

    def _step(self, released: tuple[int, ...]) -> Step:
        plan = self.plan
        width = max(len(table) for *_, table in plan.rows)
        started = [one for one, *_ in plan.rows if one.is_new]
        for one in started:
            one.is_new = False
        return Step(
            step_id=plan.number,
            sequence_ids=tuple(one.sequence_id for one, *_ in plan.rows),
            query_lengths=np.array([tokens for _, _, tokens, _ in plan.rows], np.int32),
            context_lengths=np.array([context for _, context, _, _ in plan.rows], np.int32),
            token_ids=np.concatenate([one.tokens[c : c + n] for one, c, n, _ in plan.rows]),
            block_tables=_padded([[block for block, _ in table] for *_, table in plan.rows], width),
            samples=np.ones(len(plan.rows), np.bool_),
            copied_blocks=_pairs(plan.device_copies),
            started=tuple(
                SequenceStart(one.sequence_id, one.sequence_id, sampling(logprobs=1), one.tokens, ()) for one in started
            ),
            released=released,
            transfers=Transfers(
                host_tables=_padded([one.host_blocks[: len(table)] for one, _, _, table in plan.rows], width),
                staging_tables=_padded([[slot for _, slot in table] for *_, table in plan.rows], width, -1),
                loads=_pairs(plan.loads),
                staged_blocks=np.array(plan.streams, np.int32),
                staging_blocks=np.array(plan.units, np.int32),
                host_copies=_pairs(plan.host_copies),
            ),
        )


def _padded(tables: list[list[int]], width: int, padding: int = 0) -> np.ndarray:
    return np.array([table + [padding] * (width - len(table)) for table in tables], np.int32)


def _pairs(numbers: list[tuple[int, int]]) -> np.ndarray:
    return np.array(numbers, np.int32).reshape(-1, 2)
