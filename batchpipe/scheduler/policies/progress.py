"""Progress where a schedule's own policy finds nothing to do and nothing is in flight, so that no result will come."""

from __future__ import annotations

from batchpipe.scheduler.policies.base import FirstInLine, StepShape
from batchpipe.scheduler.sequence import SequenceState
from batchpipe.scheduler.state import SchedulerState


class MakeProgress(FirstInLine):
    """Begun prompts first, since they keep their blocks on the device until they are done; then decodes, the oldest
    at any price; then whatever fits is admitted. Each time a sequence runs or ends, so no run waits for ever.
    """

    def choose(self, state: SchedulerState) -> StepShape:
        if state.ready and not state.prefilling:
            return StepShape(state.capacity.max_batch_sequences, 0, is_last_resort=True)
        return StepShape(0, state.capacity.max_step_tokens)

    def admits(self, state: SchedulerState, sequence: SequenceState) -> bool:
        """Alone at first: a policy that admits nothing decides on the next ones."""
        return not state.running and state.has_blocks(sequence)
