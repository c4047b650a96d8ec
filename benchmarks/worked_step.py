"""One step with two tiers of KV, told with its numbers: the example of docs/ARCHITECTURE.md.

    python benchmarks/worked_step.py

Sixty rows run on a simulated pipeline of four stages whose device holds a third of the KV in use. The first step is
printed that evicts, prefetches whole blocks, swaps blocks in layer by layer and does not stall. All that is said of it
is read from the `Step`s that the scheduler makes, and from their results.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from batchpipe.cost.model import KvLink, StepWork
from batchpipe.pipeline.simulated import SimulatedPipeline
from batchpipe.sample.rng import stream_of
from batchpipe.scheduler.scheduler import Scheduler
from batchpipe.types import Capacity, Step, StepResult
from benchmarks.replay_cases import EOS_TOKEN_ID, Lengths, requests_of

NUM_ROWS, PROMPT_TOKENS, COMPLETION_TOKENS = 60, 34, 14
STEP_SECONDS = 0.010
BLOCK_BYTES = 128 << 10
BLOCKS_PER_SECOND = 900
CAPACITY = Capacity(
    num_blocks=52,
    block_tokens=16,
    num_stages=4,
    max_batches=4,
    max_step_tokens=64,
    max_batch_sequences=8,
    num_host_blocks=160,
    streams_per_block=4,
    offload="layer",
)


@dataclass(frozen=True)
class ConstantCost:
    """Every step takes every stage 10 ms, beside which its link carries nine blocks."""

    num_stages: int = CAPACITY.num_stages
    control_seconds: float = 0.0

    @property
    def kv_links(self) -> tuple[KvLink, ...]:
        rate = float(BLOCKS_PER_SECOND * BLOCK_BYTES)
        num_layers = 2 * CAPACITY.streams_per_block
        link = KvLink(rate, rate, BLOCK_BYTES // CAPACITY.block_tokens // num_layers, num_layers)
        return (link,) * self.num_stages

    @property
    def distinct_stages(self) -> range:
        return range(self.num_stages)

    def stage_seconds(self, stage: int, work: StepWork) -> float:
        return STEP_SECONDS

    def handoff_seconds(self, num_tokens: int) -> float:
        return 0.0


class Device:
    """Which sequence's KV each block of the device holds, as the steps so far left it."""

    def __init__(self) -> None:
        self._owners: dict[int, int] = {}

    def evicted_by(self, step: Step) -> set[int]:
        """Sequences whose blocks the step's prefetches and its staging blocks take."""
        assert step.transfers is not None
        taken = [*step.transfers.loads[:, 1].tolist(), *step.transfers.staging_blocks.tolist()]
        return {self._owners[block] for block in taken if block in self._owners} - set(step.sequence_ids)

    def take(self, step: Step) -> None:
        """The step's sequences keep their blocks there; what passed through in layers, and what ended, does not."""
        assert step.transfers is not None
        self._owners = {block: owner for block, owner in self._owners.items() if owner not in step.released}
        for block in step.transfers.staging_blocks.tolist():
            self._owners.pop(block, None)
        num_blocks = -(-(step.context_lengths + step.query_lengths) // CAPACITY.block_tokens)
        is_used = np.arange(step.block_tables.shape[1]) < num_blocks[:, None]
        is_whole = is_used & (step.transfers.staging_tables < 0)
        for sequence, blocks, mask in zip(step.sequence_ids, step.block_tables, is_whole, strict=True):
            self._owners.update(dict.fromkeys(blocks[mask].tolist(), sequence))


def first_step_of_both_kinds() -> tuple[Step, StepResult, set[int]]:
    """The step, its result, and the sequences it evicts."""
    cost = ConstantCost()
    prompts, outputs = (np.full(NUM_ROWS, tokens, np.int32) for tokens in (PROMPT_TOKENS, COMPLETION_TOKENS))
    requests, lengths = requests_of(Lengths(prompts, outputs, PROMPT_TOKENS + COMPLETION_TOKENS))
    pipeline = SimulatedPipeline(CAPACITY, cost, lengths, EOS_TOKEN_ID)
    scheduler = Scheduler(CAPACITY, "temporal", frozenset({EOS_TOKEN_ID}), stream_of, lambda params: None, cost)
    scheduler.add(requests)
    device, candidates = Device(), dict[int, tuple[Step, set[int]]]()
    while not scheduler.idle:
        while scheduler.has_room and (step := scheduler.next_step()):
            assert step.transfers is not None
            evicted = device.evicted_by(step)
            is_decode = bool((step.query_lengths == 1).all())
            if is_decode and evicted and len(step.transfers.loads) and len(step.transfers.staged_blocks):
                candidates[step.step_id] = step, evicted
            device.take(step)
            pipeline.submit(step)
        result = pipeline.collect()
        if result.step_id in candidates and not any(use.stall_seconds for use in result.link_uses):
            step, evicted = candidates[result.step_id]
            return step, result, evicted
        scheduler.record(result)
        scheduler.take_finished()
    raise AssertionError("no step prefetches and swaps layer by layer")


def told(step: Step, result: StepResult, evicted: Iterable[int]) -> str:
    transfers = step.transfers
    assert transfers is not None
    tables = zip(step.sequence_ids, transfers.host_tables.tolist(), strict=True)
    owned = {sequence: set(blocks) for sequence, blocks in tables}
    loaded, streamed = set(transfers.loads[:, 0].tolist()), set(transfers.staged_blocks.tolist())
    prefetched = [sequence for sequence, blocks in owned.items() if blocks & loaded]
    swapped = [sequence for sequence, blocks in owned.items() if blocks & streamed]
    resident = [sequence for sequence in owned if sequence not in prefetched + swapped]
    num_moved, budget = len(loaded) + len(streamed), int(BLOCKS_PER_SECOND * STEP_SECONDS)
    stalls = [use.stall_seconds for use in result.link_uses]
    contexts = step.context_lengths
    return "\n".join(
        [
            f"step {step.step_id}: {len(owned)} sequences, one new token each behind {contexts.min()} to "
            f"{contexts.max()} tokens",
            f"  KV on the device already   sequences {_listed(resident)}",
            f"  prefetched before it       sequence {_listed(prefetched)}: host blocks {_listed(loaded)} "
            f"to device blocks {_listed(transfers.loads[:, 1].tolist())}",
            f"  swapped in layer by layer  sequence {_listed(swapped)}: host blocks {_listed(streamed)} "
            f"through device blocks {_listed(transfers.staging_blocks.tolist())}",
            f"  evicted for both           sequences {_listed(evicted)}: released, as the host has their KV",
            f"  host to device             {num_moved} blocks; the link carries {budget} in a step of "
            f"{1e3 * STEP_SECONDS:.0f} ms",
            f"  device to host             {int(step.query_lengths.sum())} tokens of new KV",
            f"  stall                      {1e3 * max(stalls):.1f} ms at most on a stage",
        ]
    )


def _listed(numbers: Iterable[int]) -> str:
    return " ".join(map(str, sorted(numbers))) or "none"


if __name__ == "__main__":
    print(told(*first_step_of_both_kinds()))
