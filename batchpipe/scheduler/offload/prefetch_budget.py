"""How many blocks of KV a step may bring to the device, so that the link is full and no step waits for it.

Forward, the budget is what the link carries while a step runs (PipeMax's sliding window, arXiv 2605.02189), by the rate
of the last loads, or by the cost model's until something was loaded. Backward, the stall that was measured corrects it
(`StallFeedback`). With neither rate it starts with a few blocks and at most doubles from load to load, as Pie expands
(arXiv 2411.09317), since the rate of a few blocks may say little about many. All is in blocks, so that one number holds
for every stage.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from batchpipe.cost.model import CostModel, seconds_without_stalls
from batchpipe.types import LinkUse

START_BLOCKS = 4
GROWTH = 2
# The median of this many steps' rates: a link that changes is believed in three, and one slow copy is not.
_RATE_STEPS = 5
# Of a budget, how far from it a step may load and still tell by its stall whether the budget is right.
_NEAR = 0.25
# A stall of this part of the loads' time: nothing ran beside them, so it does not tell whether they were too many.
_ALONE = 0.9
# Of a step, the longest stall that is felt: the rate, not the factor, has to follow a link that became slow.
_FELT = 0.1


@dataclass(slots=True)
class StallFeedback:
    """Corrects the budget, a prediction, by the stall that was measured: proportional and integral, within bounds.

    The aim is not to avoid every stall: noise makes some steps stall with any budget, and a smaller one loses batch.
    """

    factor: float = 1.0
    _integral: float = 0.0

    TARGET_SHARE = 0.01
    PROPORTIONAL = 0.5
    INTEGRAL = 0.2
    LEAST, MOST = 0.1, 1.2

    def observe(self, stall_seconds: float, step_seconds: float) -> None:
        """The stall of a step beside the time it would have taken. A long stall counts as one of a whole step."""
        error = self.TARGET_SHARE - min(1.0, stall_seconds / step_seconds)
        # What is integrated stays within the factor's bounds, so it turns at once when the error does.
        self._integral = min(max(self._integral + self.INTEGRAL * error, self.LEAST - 1), self.MOST - 1)
        self.factor = min(max(1 + self._integral + self.PROPORTIONAL * error, self.LEAST), self.MOST)


class PrefetchBudget:
    """`blocks` before a step is made, `observe` after its result came; deterministic."""

    def __init__(self, cost: CostModel | None, block_tokens: int, exposed_share: float = 0.0) -> None:
        """exposed_share: of a step's loads, what nothing can hide, so that its stall says nothing of their number."""
        self._exposed_share = exposed_share
        links = cost.kv_links if cost is not None else ()
        expected = [link.load_bytes_per_second / link.block_bytes(block_tokens) for link in links]
        self._feedback = StallFeedback()
        self._expected_blocks_per_second = min(expected) if expected else None
        self._rates: deque[float] = deque(maxlen=_RATE_STEPS)  # of the slowest stage, blocks per second
        self._most_loaded_blocks = 0
        self._last_seconds = 0.0

    @property
    def blocks_per_second(self) -> float | None:
        """What the slowest stage's link carries; None while nothing is known of it."""
        return median(self._rates) if self._rates else self._expected_blocks_per_second

    @property
    def factor(self) -> float:
        """What is asked of the link, of what it is thought to carry."""
        return self._feedback.factor

    def blocks(self, step_seconds: float | None = None) -> int:
        """Loaded and streamed blocks of a step at most, beside computing that takes `step_seconds`; at least 1.

        step_seconds: predicted, of the slowest stage; None: as long as the last step observed.
        """
        rate = self.blocks_per_second
        seconds = self._last_seconds if step_seconds is None else step_seconds
        if rate is None or seconds <= 0:
            return START_BLOCKS
        # At least one: a link that was slow once would never be seen to be fast again.
        num_blocks = max(1, int(self.factor * seconds * rate))
        if self._expected_blocks_per_second is None:
            return min(num_blocks, max(START_BLOCKS, GROWTH * self._most_loaded_blocks))
        return num_blocks

    @property
    def hides_all(self) -> bool:
        """Whether no part of the loads is exposed by design."""
        return self._exposed_share == 0.0

    def exposed_seconds(self, loaded_blocks: int) -> float:
        """What a step waits for this many blocks whatever runs beside them."""
        return self._exposed_share * loaded_blocks / rate if (rate := self.blocks_per_second) else 0.0

    def observe(self, loaded_blocks: int, stage_seconds: Sequence[float], link_uses: Sequence[LinkUse]) -> None:
        """A step that loaded and streamed this many blocks, with its `StepResult`'s times of every stage."""
        seconds = max(seconds_without_stalls(stage_seconds, link_uses))
        load_seconds = max(use.load_seconds for use in link_uses)
        if seconds <= 0:
            return  # a clock too coarse for the step says nothing
        self._last_seconds = seconds
        if loaded_blocks == 0 or load_seconds <= 0:
            return
        self._rates.append(loaded_blocks / load_seconds)
        self._most_loaded_blocks = max(self._most_loaded_blocks, loaded_blocks)
        stall_seconds = sum(use.stall_seconds for use in link_uses) / len(link_uses)
        stall_seconds = max(0.0, stall_seconds - self._exposed_share * load_seconds)
        # Far more than the budget stalls and far less does not; neither tells whether the budget is right.
        if stall_seconds < _ALONE * load_seconds and abs(loaded_blocks / self.blocks(seconds) - 1) <= _NEAR:
            self._feedback.observe(min(stall_seconds, _FELT * seconds), seconds)
