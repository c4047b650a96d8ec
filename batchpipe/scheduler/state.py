"""What the scheduler knows and policies look at: the queues, who runs, the blocks, what lengths and time to expect."""

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
    """A sequence waits, is admitted (it runs from then on), is prefilled in pieces, then is ready or in flight."""

    capacity: Capacity
    ledger: BlockManager
    survival: Survival | None = None  # None: nothing is predicted
    cost: CostModel | None = None  # None: time is taken to be proportional to tokens
    waiting: WaitingQueue = field(default_factory=WaitingQueue)
    prefilling: deque[SequenceState] = field(default_factory=deque)
    ready: deque[SequenceState] = field(default_factory=deque)
    running: dict[int, SequenceState] = field(default_factory=dict)  # in order of admission
    context_tokens: int = 0  # of all that run, together
    limit_blocks: int = field(init=False)  # KV that can be kept in motion: what may run is no more than this

    def __post_init__(self) -> None:
        self.limit_blocks = self.ledger.num_blocks

    @property
    def max_running(self) -> int:
        return self.capacity.max_batch_sequences * self.capacity.max_batches

    @property
    def decode_share(self) -> int:
        """The decodes of one of the circulating batches, so that all batches hold the same number."""
        share = -(-len(self.running) // self.capacity.max_batches)
        return min(len(self.ready), share, self.capacity.max_batch_sequences)

    def has_blocks(self, sequence: SequenceState, num_reserved: int = 0) -> bool:
        """All of the sequence's tokens so far find room, and so many blocks stay free."""
        if len(self.running) >= self.max_running:
            return False
        num_spare = min(self.ledger.num_free, self.limit_blocks - self.ledger.num_used)
        if num_spare <= num_reserved:
            return False
        return self.ledger.new_blocks_for(sequence.prompt, sequence.num_tokens) + num_reserved <= num_spare

    def blocks_of_prompts(self, num_tokens: int) -> int:
        """What the waiting prompts would take that can begin in a step with so many tokens for prompts."""
        num_tokens -= sum(sequence.num_tokens - sequence.num_scheduled for sequence in self.prefilling)
        num_blocks = 0
        for sequence in islice(self.waiting, max(0, self.max_running - len(self.running))):
            if num_tokens <= 0:
                break
            num_new = self.ledger.new_blocks_for(sequence.prompt, sequence.num_tokens)
            num_blocks += num_new
            num_tokens -= min(sequence.num_tokens, num_new * self.ledger.block_tokens)
        return num_blocks
