"""How much KV may be in use: by the link, and where a single batch waits for it only as far as that brings tokens."""

from __future__ import annotations

import pytest

from batchpipe.cost.model import KvLink
from batchpipe.kv.block_manager import BlockManager
from batchpipe.scheduler.offload.prefetch_budget import PrefetchBudget
from batchpipe.scheduler.offload.working_set_limit import RECONSIDER_STEPS, WorkingSetLimit
from batchpipe.scheduler.state import SchedulerState
from batchpipe.scheduler.step_time import StepTime
from tests.cost.formula_cost import FormulaCost
from tests.scheduler.scheduler_cases import capacity, request, scheduler_for

NUM_DEVICE, NUM_HOST = 100, 1000


LINK = KvLink(load_bytes_per_second=8e4, store_bytes_per_second=8e4, kv_bytes_per_token_layer=1, num_layers=1)


def linear(fixed_seconds: float, seconds_each: float) -> FormulaCost:
    """A step takes the fixed time and more for each sequence; the link carries 20,000 blocks a second."""
    return FormulaCost(lambda stage, work: fixed_seconds + seconds_each * work.num_decodes, kv_links=(LINK,))


def limit_for(cost: FormulaCost | None, exposed_share: float) -> tuple[WorkingSetLimit, SchedulerState]:
    """With ten sequences of four blocks that run: the device holds 25 such."""
    offered = capacity(
        num_blocks=NUM_DEVICE, num_host_blocks=NUM_HOST, max_batch_sequences=500, offload="layer", streams_per_block=10
    )
    state = SchedulerState(offered, BlockManager(NUM_HOST, 4), cost=cost)
    scheduler = scheduler_for(offered)
    scheduler.add([request(i, 16) for i in range(10)])
    for sequence in list(scheduler.state.waiting):
        state.ledger.grow(sequence.sequence_id, 16)
        state.running[sequence.sequence_id] = sequence
        state.context_tokens += 16
    return WorkingSetLimit(state, PrefetchBudget(cost, 4, exposed_share), StepTime(state), 0.1), state


@pytest.mark.parametrize(
    ("fixed_seconds", "seconds_each", "exposed_share", "moves"),
    [
        (0.010, 0.0, 0.05, True),  # the weights' time is all: the more sequences the better
        (0.001, 0.001, 0.05, False),  # a sequence costs as much in any batch
        (0.001, 0.001, 0.0, True),  # but nothing is lost where all is hidden
        (0.002, 0.001, 0.05, True),
        (0.002, 0.001, 0.9, False),  # what is waited for eats what the batch brings
    ],
)
def test_kv_moves_where_that_brings_tokens(
    fixed_seconds: float, seconds_each: float, exposed_share: float, moves: bool
) -> None:
    limit, _ = limit_for(linear(fixed_seconds, seconds_each), exposed_share)
    blocks = limit.blocks()
    assert NUM_DEVICE <= blocks <= NUM_HOST
    assert (blocks > NUM_DEVICE) == moves


def test_without_a_cost_model_the_link_alone_counts() -> None:
    limit, _ = limit_for(None, 0.05)
    assert limit.blocks() > NUM_DEVICE


def test_an_answer_stands_for_a_while() -> None:
    fixed_seconds, seconds_each = 0.001, 0.001
    cost = FormulaCost(lambda stage, work: fixed_seconds + seconds_each * work.num_decodes, kv_links=(LINK,))
    limit, _ = limit_for(cost, 0.05)
    assert limit.blocks() == NUM_DEVICE
    fixed_seconds, seconds_each = 0.01, 0.0
    later = [limit.blocks() for _ in range(RECONSIDER_STEPS + 1)]
    assert later[:-1] == [NUM_DEVICE] * RECONSIDER_STEPS and later[-1] > NUM_DEVICE
