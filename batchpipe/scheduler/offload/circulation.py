"""Batches that circulate over a pipeline whose KV is on two tiers: who runs in each step, who is loaded, who leaves.

One plan in step order holds for all stages. Step i belongs to batch i mod C and may hold sequences whose last step was
i - C or before, since that one's tokens are known by then. All KV is on the host; the device holds part of it besides:

- `Window.BATCH` (PipeMax, arXiv 2605.02189): while step i - 1 runs, the loads of step i go to blocks that the batch of
  step i - 2 gave up; what was loaded stays until its blocks are needed.
- `Window.LAYERS` (ours): the loads of step i come group of layers by group while step i itself runs, into room for two
  groups, and are forgotten; who finds room on the device after the step stays there.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from batchpipe.cost.model import StepWork
from batchpipe.predict.base import FloatArray
from batchpipe.scheduler.offload.decode_time import DecodeTime, IntArray
from batchpipe.scheduler.offload.residency import NOBODY, Residency, Tiers, Window
from batchpipe.scheduler.offload.selection import (
    HOST_WATERMARK,
    Aim,
    Candidates,
    StallFeedback,
    batch_capacity_blocks,
    prefetch_budget_bytes,
    prefills_next,
    select,
)

# A sequence on the host runs after so many of its batch's turns at the latest, as far as the budget lets one more run.
MAX_WAIT_TURNS = 64
# Prompts ride along until so much more KV is live than batches can hold, in so many rounds that steps stay equal.
LIVE_SURPLUS = 1.1
RIDE_ROUNDS = 8


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
    running_blocks: int
    loaded_blocks: int
    stored_tokens: int


class Circulation:
    """Sequences by number, [N]. `output_tokens` are the true lengths, looked at only when a token was drawn."""

    def __init__(
        self, prompt_tokens: IntArray, output_tokens: IntArray, tiers: Tiers, manner: Manner, time: DecodeTime
    ) -> None:
        self.tiers, self.manner, self.time = tiers, manner, time
        self.feedback = StallFeedback()
        self.num_ended = 0
        # A step's prompts, and one that is only computed in part, have KV that no sequence owns yet.
        transit_blocks = -(-(manner.max_step_tokens + int(prompt_tokens.max())) // tiers.block_tokens)
        self.residency = Residency(len(prompt_tokens), tiers, manner.num_batches, manner.window, transit_blocks)
        longest_blocks = int(self.residency.blocks_of(prompt_tokens + output_tokens).max())
        assert self.residency.room_blocks >= longest_blocks, "a sequence that the device cannot hold"
        self._prompt_tokens, self._left_tokens = prompt_tokens, output_tokens.copy()
        self._last_step = np.full(len(prompt_tokens), -manner.num_batches)
        self._next_prompt, self._next_prompt_done = 0, 0  # the first one not finished, and its tokens that are
        self._prefilling = True
        self._last_seconds = float(time.seconds(1, 0))
        self._recent_seconds: deque[float] = deque(maxlen=2 * manner.num_batches)  # of steps with decodes

    @property
    def done(self) -> bool:
        return self.num_ended == len(self._prompt_tokens)

    def next_step(self, index: int) -> CirculatedStep | None:
        """Decides step `index`; None: its batch has nobody, and no prompt is due. All earlier steps are decided."""
        manner, residency = self.manner, self.residency
        prompts_left = self._next_prompt < len(self._prompt_tokens)
        if not manner.rides and prompts_left:
            prompt_blocks = int(residency.blocks_of(int(self._prompt_tokens[self._next_prompt])))
            self._prefilling = prefills_next(
                self._prefilling, residency.live_blocks, prompt_blocks, residency.room_blocks, self.tiers.host_blocks
            )
            if self._prefilling:
                residency.make_room(index, 0, 0)
                return self._made(index, NOBODY, manner.max_step_tokens, 0, 0)
        prompt_tokens = self._riding_tokens() if manner.rides and prompts_left else 0
        budget_blocks = self._budget_blocks()
        buffer_blocks = int(np.ceil(manner.num_buffers * budget_blocks)) if manner.window is Window.LAYERS else 0
        running, loaded_blocks = self._decodes(index, prompt_tokens, budget_blocks, buffer_blocks)
        prompt_tokens = min(prompt_tokens, manner.max_step_tokens - len(running))
        if not len(running) and not prompt_tokens:
            return None
        return self._made(index, running, prompt_tokens, loaded_blocks, buffer_blocks)

    def record(self, step: CirculatedStep) -> None:
        """The step's tokens: a token more for each, and some end. Called before the batch's next turn."""
        drawn = np.concatenate([step.running, step.begun])
        self.residency.context_tokens[step.running] += 1
        self._left_tokens[drawn] -= 1
        ended = drawn[self._left_tokens[drawn] == 0]
        self.num_ended += len(ended)
        self.residency.end(ended)

    def _decodes(self, index: int, prompt_tokens: int, budget_blocks: int, buffer_blocks: int) -> tuple[IntArray, int]:
        """Who decodes beside so many prompt tokens, and the blocks loaded; makes and fills room on the device."""
        residency, turn = self.residency, index % self.manner.num_batches
        known = residency.live[self._last_step[residency.live] <= index - self.manner.num_batches]
        pool = known[~residency.on_device[known]]
        wanted_blocks = min(budget_blocks, int(residency.blocks(pool).sum()))
        room_blocks = residency.make_room(index, wanted_blocks, buffer_blocks)
        pool = known[~residency.on_device[known]] if self.manner.window is Window.LAYERS else pool
        pool = pool[residency.blocks(pool) <= room_blocks]
        kept = known[residency.batch[known] == turn]
        # Who has waited longest is first, where a batch holds more than run at once.
        kept = kept[np.argsort(self._last_step[kept], kind="stable")][: self._max_sequences()]
        chosen = self._chosen(index, kept, pool, prompt_tokens, budget_blocks, room_blocks)
        residency.settle(chosen, turn, buffer_blocks)
        running = np.concatenate([kept, chosen])
        self._last_step[running] = index
        return running, int(residency.blocks(chosen).sum())

    def _chosen(
        self, index: int, kept: IntArray, pool: IntArray, prompt_tokens: int, budget_blocks: int, room_blocks: int
    ) -> IntArray:
        max_sequences = self._max_sequences() - len(kept)
        if not len(pool) or max_sequences <= 0:
            return NOBODY
        residency = self.residency
        waited, blocks = index - self._last_step[pool], residency.blocks(pool)
        max_wait_steps = MAX_WAIT_TURNS * self.manner.num_batches
        oldest = int(np.argmax(waited))
        if waited[oldest] >= max_wait_steps:
            # Else a sequence larger than the budget would never run. The link is late then, for once.
            budget_blocks = max(budget_blocks, int(blocks[oldest]))
        if min(budget_blocks, room_blocks) <= 0:
            return NOBODY
        aim = Aim(
            time=self.time,
            limit_blocks=min(budget_blocks, room_blocks),
            max_sequences=max_sequences,
            num_kept=len(kept),
            kept_context_tokens=int(residency.context_tokens[kept].sum()),
            num_other_rows=prompt_tokens,
            target_seconds=self._target_seconds(),
            max_wait_steps=max_wait_steps,
        )
        return pool[select(Candidates(residency.context_tokens[pool], blocks, waited), aim)]

    def _made(
        self, index: int, running: IntArray, prompt_tokens: int, loaded_blocks: int, buffer_blocks: int
    ) -> CirculatedStep:
        running_blocks = int(self.residency.blocks(running).sum())
        context_tokens = int(self.residency.context_tokens[running].sum())
        begun, num_prompt_tokens, pairs = self._take_prompts(index, prompt_tokens, buffer_blocks)
        num_rows = len(running) + num_prompt_tokens
        work = StepWork(num_rows, len(running) + len(begun), len(running), context_tokens + len(running), pairs)
        self._last_seconds = float(self.time.seconds(num_rows, context_tokens))
        if len(running):
            self._recent_seconds.append(self._last_seconds)
        return CirculatedStep(index, running, begun, work, running_blocks, loaded_blocks, num_rows)

    def _take_prompts(self, index: int, num_tokens: int, buffer_blocks: int) -> tuple[IntArray, int, int]:
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
                self._last_step[sequence] = index
                self.residency.begin(sequence, int(self._prompt_tokens[sequence]), buffer_blocks)
        return np.array(begun, dtype=np.int64), taken, pairs

    def _budget_blocks(self) -> int:
        """What may be loaded while the step before this one runs, or by LAYERS while one like the last does."""
        if self.manner.fixed_budget_blocks is not None:
            return self.manner.fixed_budget_blocks
        own = self._recent_seconds and self.manner.window is Window.LAYERS
        seconds = self._recent_seconds[-1] if own else self._last_seconds
        factor = self.feedback.factor if self.manner.corrected else 1.0
        budget_bytes = factor * float(prefetch_budget_bytes(seconds, self.tiers.load_bytes_per_second))
        # More than half of the device could never be loaded and run beside.
        return min(int(budget_bytes) // self.tiers.block_bytes, self.residency.room_blocks // 2)

    def _max_sequences(self) -> int:
        live, limit = self.residency.live, self.manner.max_batch_sequences
        if not self.manner.edge or not len(live):
            return limit
        return self.time.edge_sequences(limit, float(self.residency.context_tokens[live].mean()))

    def _target_seconds(self) -> float | None:
        """The mean of the last round's steps; None while rounds still get longer (warm-up)."""
        recent, num_batches = list(self._recent_seconds), self.manner.num_batches
        if len(recent) < 2 * num_batches:
            return None
        before, last = sum(recent[:num_batches]), sum(recent[num_batches:])
        return None if last > 1.01 * before else last / num_batches

    def _riding_tokens(self) -> int:
        """What live KV lacks of its aim, spread over rounds."""
        lacking_tokens = (self._target_live_blocks() - self.residency.live_blocks) * self.tiers.block_tokens
        num_steps = RIDE_ROUNDS * self.manner.num_batches
        return max(0, min(self.manner.max_step_tokens, -(-lacking_tokens // num_steps)))

    def _target_live_blocks(self) -> int:
        """KV for which all batches are as large as they can be, and a little more to choose from."""
        manner, tiers, residency = self.manner, self.tiers, self.residency
        if not len(residency.live):
            return residency.room_blocks

        def capacity_blocks(step_seconds: FloatArray) -> FloatArray:
            budget_blocks = prefetch_budget_bytes(step_seconds, tiers.load_bytes_per_second) / tiers.block_bytes
            return batch_capacity_blocks(residency.room_blocks, budget_blocks, manner.num_batches, manner.num_buffers)

        blocks_each = residency.live_blocks / len(residency.live)
        context_each = float(residency.context_tokens[residency.live].mean())
        num_sequences = self.time.steady_sequences(self._max_sequences(), context_each, blocks_each, capacity_blocks)
        target_blocks = LIVE_SURPLUS * manner.num_batches * num_sequences * blocks_each
        return int(min(target_blocks, HOST_WATERMARK * tiers.host_blocks))
