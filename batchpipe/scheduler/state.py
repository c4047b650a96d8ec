"""What the scheduler knows and policies look at: queues, running sequences, KV blocks, expected lengths and times."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import islice

from batchpipe.cost.model import CostModel
from batchpipe.kv.block_manager import BlockManager
from batchpipe.predict.base import Survival
from batchpipe.scheduler.sequence import SequenceState
from batchpipe.scheduler.waiting_queue import WaitingQueue
from batchpipe.types import Capacity


@dataclass(slots=True)
class SchedulerState:
    """A sequence waits, is admitted (it runs from then on), is prefilled in chunks, then is ready or in flight.

    limit_blocks: KV of running sequences at most: with two tiers, what the link can keep in motion.
    """

    capacity: Capacity
    ledger: BlockManager
    survival: Survival | None = None  # None: nothing is predicted
    cost: CostModel | None = None  # None: time is taken to be proportional to tokens
    waiting: WaitingQueue = field(default_factory=WaitingQueue)
    prefilling: deque[SequenceState] = field(default_factory=deque)
    ready: deque[SequenceState] = field(default_factory=deque)
    running: dict[int, SequenceState] = field(default_factory=dict)  # in order of admission
    context_tokens: int = 0  # of all running sequences together
    limit_blocks: int = field(init=False)

    def __post_init__(self) -> None:
        self.limit_blocks = self.ledger.num_blocks

    @property
    def max_running(self) -> int:
        return self.capacity.max_batch_sequences * self.capacity.max_batches

    @property
    def decode_share(self) -> int:
        """The decodes of one of the batches in flight, so that all hold the same number."""
        share = -(-len(self.running) // self.capacity.max_batches)
        return min(len(self.ready), share, self.capacity.max_batch_sequences)

    @property
    def mean_context_tokens(self) -> float:
        """Of the running sequences, of which there is one at least."""
        return self.context_tokens / len(self.running)

    @property
    def has_two_tiers(self) -> bool:
        return self.capacity.num_host_blocks > 0

    def has_blocks(self, sequence: SequenceState, num_reserved: int = 0, limit_blocks: int | None = None) -> bool:
        """Whether all of the sequence's tokens so far find room, with `num_reserved` blocks left.

        limit_blocks: of all running sequences; None: the state's own.
        """
        if len(self.running) >= self.max_running:
            return False
        limit_blocks = self.limit_blocks if limit_blocks is None else limit_blocks
        num_spare = min(self.ledger.num_free, limit_blocks - self.ledger.num_used)
        if num_spare <= num_reserved:
            return False
        return self.ledger.new_blocks_for(sequence.prompt, sequence.num_tokens) + num_reserved <= num_spare

    def pending_prefill_tokens(self, admits: bool) -> int:
        """Tokens of prompts to compute: of those under way, and of those that find room where the first is admitted."""
        num_tokens = sum(sequence.num_tokens - sequence.num_scheduled for sequence in self.prefilling)
        if admits:
            num_room = (self.limit_blocks - self.ledger.num_used) * self.ledger.block_tokens
            num_tokens += max(num_room, self.waiting.first.num_tokens)
        return num_tokens

    def blocks_of_prompts(self, num_tokens: int) -> int:
        """Blocks of the waiting prompts that can begin in a step which holds `num_tokens` tokens of prompts."""
        num_tokens -= sum(sequence.num_tokens - sequence.num_scheduled for sequence in self.prefilling)
        num_blocks = 0
        for sequence in islice(self.waiting, max(0, self.max_running - len(self.running))):
            if num_tokens <= 0:
                break
            num_new = self.ledger.new_blocks_for(sequence.prompt, sequence.num_tokens)
            num_blocks += num_new
            num_tokens -= min(sequence.num_tokens, num_new * self.ledger.block_tokens)
        return num_blocks
