"""Batches that circulate over a pipeline whose KV is on two tiers: who runs in each step, who is loaded, who leaves.

One plan in step order holds for all stages. Step i belongs to batch i mod C and may hold sequences whose last step was
i - C or before, since that one's tokens are known by then. All KV is on the host; the device holds part of it besides:

- `Window.BATCH` (PipeMax): while step i - 1 runs, the loads of step i go to blocks that the batch of step i - 2 gave
  up; what was loaded stays until its blocks are needed.
- `Window.LAYERS` (ours): the loads of step i come group of layers by group while step i itself runs, into room for two
  groups, and are forgotten; who finds room on the device after the step stays there.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from batchpipe.plan.cost import StepWork
from batchpipe.plan.offload import (
    HOST_WATERMARK, Aim, Candidates, DecodeTime, IntArray, StallFeedback, batch_capacity_blocks, evictions,
    prefetch_budget_bytes, prefills_next, select,
)  # fmt: skip
from batchpipe.predict.base import FloatArray

# A sequence on the host runs after so many of its batch's turns at the latest, as far as the budget lets one more run.
MAX_WAIT_TURNS = 64
# Prompts ride along until so much more KV is live than batches can hold.
LIVE_SURPLUS = 1.1
RIDE_ROUNDS = 8
_NOBODY = np.zeros(0, dtype=np.int64)


class Window(StrEnum):
    BATCH = "batch"
    LAYERS = "layers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiers:
    """Room for KV in blocks, the same on every stage, and what the link is believed to carry into the device."""

    device_blocks: int
    host_blocks: int
    block_tokens: int
    block_bytes: int  # of one stage
    load_bytes_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How batches circulate. fixed_budget_blocks: loads of a step that do not depend on its time; None: they do.

    num_groups: of layers, where the window is LAYERS. rides: prompts in the steps of decodes, in place of phases.
    edge: a batch grows only while tokens per second do. corrected: budgets follow the stall that was measured.
    """

    num_batches: int
    window: Window
    num_groups: int
    fixed_budget_blocks: int | None
    rides: bool
    edge: bool
    corrected: bool
    max_step_tokens: int
    max_batch_sequences: int

    @property
    def num_buffers(self) -> float:
        return 2.0 if self.window is Window.BATCH else 2.0 / self.num_groups


@dataclass(frozen=True, slots=True)
class CirculatedStep:
    """One step: who decodes, whose prompts end, what every stage loads before or during it and stores after it."""

    index: int
    running: IntArray
    begun: IntArray
    work: StepWork
    predicted_seconds: float
    running_blocks: int
    loaded_blocks: int
    stored_tokens: int


class Circulation:
    """Sequences by number, [N]. `output_tokens` are the true lengths, looked at only when a token was drawn."""

    def __init__(
        self, prompt_tokens: IntArray, output_tokens: IntArray, tiers: Tiers, manner: Manner, time: DecodeTime
    ) -> None:
        count = len(prompt_tokens)
        self.tiers, self.manner, self.time = tiers, manner, time
        self.feedback = StallFeedback()
        self.num_ended = 0
        self.live: IntArray = _NOBODY  # have their prompt's KV, and have not ended
        self.on_device = np.zeros(count, dtype=np.bool_)
        self.context_tokens = np.zeros(count, dtype=np.int64)
        self._prompt_tokens, self._left_tokens = prompt_tokens, output_tokens.copy()
        self._batch = np.full(count, -1)
        self._last_step = np.full(count, -manner.num_batches)
        self._next_prompt, self._next_prompt_done = 0, 0  # the first one not finished, and its tokens that are
        self._prefilling = True
        self._last_seconds = float(time.seconds(1, 0))
        self._recent_seconds: deque[float] = deque(maxlen=2 * manner.num_batches)
        # A step's prompts, and one that is only computed in part, have KV that no sequence owns yet.
        transit_tokens = manner.max_step_tokens + int(prompt_tokens.max())
        self._sequence_room = tiers.device_blocks - -(-transit_tokens // tiers.block_tokens)
        assert self._sequence_room >= int(self._blocks_of(prompt_tokens + output_tokens).max()), "a sequence cannot fit"

    @property
    def done(self) -> bool:
        return self.num_ended == len(self._prompt_tokens)

    def next_step(self, index: int) -> CirculatedStep | None:
        """Decides step `index`; None: its batch has nobody, and no prompt is due. All earlier steps are decided."""
        prompts_left = self._next_prompt < len(self._prompt_tokens)
        if not self.manner.rides and prompts_left:
            self._prefilling = prefills_next(
                self._prefilling, self._live_blocks(), self._next_prompt_blocks(),
                self._sequence_room, self.tiers.host_blocks,
            )  # fmt: skip
            if self._prefilling:
                return self._made(index, _NOBODY, self.manner.max_step_tokens, 0)
        prompt_tokens = self._riding_tokens() if self.manner.rides and prompts_left else 0
        running, loaded = self._decodes(index, prompt_tokens)
        prompt_tokens = min(prompt_tokens, self.manner.max_step_tokens - len(running))
        if not len(running) and not prompt_tokens:
            return None
        return self._made(index, running, prompt_tokens, loaded)

    def record(self, step: CirculatedStep) -> None:
        """The step's tokens: a token more for each, and some end. Called before the batch's next turn."""
        drawn = np.concatenate([step.running, step.begun])
        self.context_tokens[step.running] += 1
        self._left_tokens[drawn] -= 1
        ended = drawn[self._left_tokens[drawn] == 0]
        self.on_device[ended] = False
        self.num_ended += len(ended)
        self.live = self.live[self._left_tokens[self.live] > 0]

    def check(self) -> None:
        """Both tiers hold what they can hold, and nobody has KV who has ended."""
        resident = np.flatnonzero(self.on_device)
        assert np.isin(resident, self.live).all(), "KV of nobody on the device"
        assert self._blocks(resident).sum() <= self._sequence_room, "more KV than the device holds"
        assert self._live_blocks() <= self.tiers.host_blocks, "more KV than the host holds"

    def _decodes(self, index: int, prompt_tokens: int) -> tuple[IntArray, int]:
        """Who decodes beside so many prompt tokens, and the blocks loaded; makes and fills room on the device."""
        budget_blocks = self._budget_blocks()
        manner, turn = self.manner, index % self.manner.num_batches
        known = self.live[self._last_step[self.live] <= index - manner.num_batches]
        here = self.on_device[known]
        pool = known[~here]
        kept = known[here & (self._batch[known] == turn)]
        max_sequences = self._max_sequences()
        # Who has waited longest is first, where a batch holds more than run at once.
        kept = kept[np.argsort(self._last_step[kept], kind="stable")][:max_sequences]
        room_blocks = self._make_room(index, budget_blocks, int(self._blocks(pool).sum()))
        pool = pool[self._blocks(pool) <= room_blocks]
        chosen = self._select(index, kept, pool, budget_blocks, room_blocks, max_sequences, prompt_tokens)
        loaded = int(self._blocks(chosen).sum())
        self._settle(chosen, turn)
        running = np.concatenate([kept, chosen])
        self._last_step[running] = index
        return running, loaded

    def _select(
        self, index: int, kept: IntArray, pool: IntArray, budget_blocks: int, room_blocks: int, max_sequences: int,
        prompt_tokens: int,
    ) -> IntArray:  # fmt: skip
        if not len(pool) or not budget_blocks:
            return _NOBODY
        waited = index - self._last_step[pool]
        blocks = self._blocks(pool)
        max_wait_steps = MAX_WAIT_TURNS * self.manner.num_batches
        oldest = int(np.argmax(waited))
        if waited[oldest] >= max_wait_steps:
            # Else a sequence larger than the budget would never run. The link is late then, for once.
            budget_blocks = max(budget_blocks, int(blocks[oldest]))
        aim = Aim(
            time=self.time,
            limit_blocks=min(budget_blocks, room_blocks),
            max_sequences=max_sequences - len(kept),
            num_kept=len(kept),
            kept_context_tokens=int(self.context_tokens[kept].sum()),
            num_other_rows=prompt_tokens,
            target_seconds=self._target_seconds(),
            max_wait_steps=max_wait_steps,
        )
        if aim.limit_blocks <= 0 or aim.max_sequences <= 0:
            return _NOBODY
        return pool[select(Candidates(self.context_tokens[pool], blocks, waited), aim)]

    def _make_room(self, index: int, budget_blocks: int, wanted_blocks: int) -> int:
        """Releases what must leave; the blocks that loads of this step may take."""
        num_batches, by_layers = self.manner.num_batches, self.manner.window is Window.LAYERS
        resident = self.live[self.on_device[self.live]]
        blocks = self._blocks(resident)
        turns_away = (self._batch[resident] - index) % num_batches
        if by_layers:
            # The batch that runs may lose blocks too: from now on it is loaded as it runs.
            free = self._sequence_room - self._buffer_blocks(budget_blocks) - int(blocks.sum())
            leaving = evictions(blocks, np.where(turns_away == 0, num_batches, turns_away), -free)
            self._release(resident[leaving])
            return self._sequence_room
        free = self._sequence_room - int(blocks.sum())
        # Step i - 1 still runs while this step's loads come.
        movable = (turns_away != 0) & (turns_away != num_batches - 1)
        leaving = evictions(blocks[movable], turns_away[movable], -free)
        gone = resident[movable][leaving]
        free += int(self._blocks(gone).sum())
        self._release(gone)
        lately = resident[turns_away == num_batches - 2] if num_batches > 2 else _NOBODY
        lately = lately[self.on_device[lately]]
        needed = min(budget_blocks, wanted_blocks) - free
        leaving = evictions(self._blocks(lately), np.zeros(len(lately), dtype=np.int64), needed)
        free += int(self._blocks(lately[leaving]).sum())
        self._release(lately[leaving])
        return max(0, free)

    def _settle(self, newcomers: IntArray, turn: int) -> None:
        """Gives sequences room on the device and a batch, as far as there is room; by BATCH, there is."""
        resident = self.live[self.on_device[self.live]]
        free = self._sequence_room - int(self._blocks(resident).sum())
        if self.manner.window is Window.LAYERS:
            free -= self._buffer_blocks(self._budget_blocks())
        fitting = newcomers[np.cumsum(self._blocks(newcomers)) <= free]
        self.on_device[fitting] = True
        self._batch[fitting] = turn

    def _made(self, index: int, running: IntArray, prompt_tokens: int, loaded_blocks: int) -> CirculatedStep:
        begun, num_prompt_tokens, pairs = self._take_prompts(index, prompt_tokens)
        context_tokens = int(self.context_tokens[running].sum())
        num_drawn = len(running) + len(begun)
        num_rows = len(running) + num_prompt_tokens
        work = StepWork(num_rows, num_drawn, len(running), context_tokens + len(running), pairs)
        seconds = float(self.time.seconds(num_rows, context_tokens))
        self._last_seconds = seconds
        if len(running):
            self._recent_seconds.append(seconds)
        blocks = int(self._blocks(running).sum())
        return CirculatedStep(index, running, begun, work, seconds, blocks, loaded_blocks, num_rows)

    def _take_prompts(self, index: int, num_tokens: int) -> tuple[IntArray, int, int]:
        """Computes so many tokens of the next prompts: whose prompt ends, tokens taken, pairs of attention."""
        begun, taken, pairs = [], 0, 0
        while taken < num_tokens and self._next_prompt < len(self._prompt_tokens):
            sequence, start = self._next_prompt, self._next_prompt_done
            piece = min(num_tokens - taken, int(self._prompt_tokens[sequence]) - start)
            pairs += piece * start + piece * (piece + 1) // 2
            taken += piece
            self._next_prompt_done += piece
            if self._next_prompt_done == self._prompt_tokens[sequence]:
                begun.append(sequence)
                self._next_prompt, self._next_prompt_done = sequence + 1, 0
        ids = np.array(begun, dtype=np.int64)
        self.context_tokens[ids] = self._prompt_tokens[ids]
        self._last_step[ids] = index
        self.live = np.concatenate([self.live, ids])
        for sequence in ids:
            resident = self.live[self.on_device[self.live]]
            held = np.bincount(self._batch[resident], self._blocks(resident), self.manner.num_batches)
            self._settle(np.array([sequence]), int(held.argmin()))
        return ids, taken, pairs

    def _budget_blocks(self) -> int:
        if self.manner.fixed_budget_blocks is not None:
            return self.manner.fixed_budget_blocks
        decodes = self._recent_seconds and self.manner.window is Window.LAYERS
        seconds = self._recent_seconds[-1] if decodes else self._last_seconds
        budget_bytes = prefetch_budget_bytes(seconds, self.tiers.load_bytes_per_second)
        factor = self.feedback.factor if self.manner.corrected else 1.0
        # More than half of the device could never be loaded and run beside.
        return min(int(factor * budget_bytes) // self.tiers.block_bytes, self._sequence_room // 2)

    def _buffer_blocks(self, budget_blocks: int) -> int:
        return int(np.ceil(self.manner.num_buffers * budget_blocks))

    def _max_sequences(self) -> int:
        limit = self.manner.max_batch_sequences
        if not self.manner.edge or not len(self.live):
            return limit
        return self.time.edge_sequences(limit, float(self.context_tokens[self.live].mean()))

    def _target_seconds(self) -> float | None:
        """The mean of the last round's steps; None while rounds still get longer (warm-up)."""
        recent, num_batches = list(self._recent_seconds), self.manner.num_batches
        if len(recent) < 2 * num_batches:
            return None
        before, last = sum(recent[:num_batches]), sum(recent[num_batches:])
        return None if last > 1.01 * before else last / num_batches

    def _target_live_blocks(self) -> int:
        """KV for which all batches are as large as they can be, and a little more to choose from."""
        if not len(self.live):
            return self._sequence_room
        manner, tiers = self.manner, self.tiers

        def capacity_blocks(step_seconds: FloatArray) -> FloatArray:
            budget_blocks = prefetch_budget_bytes(step_seconds, tiers.load_bytes_per_second) / tiers.block_bytes
            return batch_capacity_blocks(self._sequence_room, budget_blocks, manner.num_batches, manner.num_buffers)

        blocks_each = self._live_blocks() / len(self.live)
        num_sequences = self.time.steady_sequences(
            self._max_sequences(), float(self.context_tokens[self.live].mean()), blocks_each, capacity_blocks
        )  # fmt: skip
        target_blocks = LIVE_SURPLUS * manner.num_batches * num_sequences * blocks_each
        return int(min(target_blocks, HOST_WATERMARK * tiers.host_blocks))

    def _riding_tokens(self) -> int:
        """What live KV lacks of its aim, spread over rounds, so that steps stay equal."""
        lacking_tokens = (self._target_live_blocks() - self._live_blocks()) * self.tiers.block_tokens
        num_steps = RIDE_ROUNDS * self.manner.num_batches
        return max(0, min(self.manner.max_step_tokens, -(-lacking_tokens // num_steps)))

    def _next_prompt_blocks(self) -> int:
        return int(self._blocks_of(self._prompt_tokens[self._next_prompt]))

    def _live_blocks(self) -> int:
        return int(self._blocks(self.live).sum())

    def _blocks(self, sequences: IntArray) -> IntArray:
        """With room for the next token."""
        return self._blocks_of(self.context_tokens[sequences] + 1)

    def _blocks_of(self, tokens: IntArray) -> IntArray:
        return -(-tokens // self.tiers.block_tokens)

    def _release(self, sequences: IntArray) -> None:
        self.on_device[sequences] = False
        self._batch[sequences] = -1
