"""What every schedule's policy must do, whatever else it aims at: propose within the limits, select what is there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.predict.base import Survival
from batchpipe.scheduler.offload.selection import PrefetchWindow
from batchpipe.scheduler.policies.base import Policy
from batchpipe.scheduler.policies.progress import MakeProgress
from batchpipe.scheduler.policies.schedules import SCHEDULES
from batchpipe.scheduler.sequence import SequenceState
from batchpipe.scheduler.state import SchedulerState
from tests.cost.formula_cost import FormulaCost
from tests.scheduler.scheduler_cases import capacity, fake, request, scheduler_for

COST = FormulaCost(lambda stage, work: 1e-3 + 1e-4 * work.num_tokens + 1e-6 * work.decode_context_tokens, num_stages=3)
CURVES = Survival(np.array([0, 20, 40], np.int32), np.array([[1.0, 0.5, 0.0]]))

every_policy = pytest.mark.parametrize("make", [*SCHEDULES.values(), MakeProgress], ids=[*SCHEDULES, "progress"])


def state_after(
    num_steps: int, seed: int, offload: str, cost: FormulaCost | None, curves: Survival | None
) -> SchedulerState:
    """Of a scheduler under way: some rows run, some are ready, some wait."""
    offered = capacity(
        num_blocks=60,
        max_batches=3,
        num_stages=3,
        max_batch_sequences=16,
        num_host_blocks=0 if offload == "none" else 200,
        streams_per_block=3,
        offload=offload,
    )
    scheduler, pipeline = scheduler_for(offered, "hybrid"), fake(offered)
    scheduler.state.cost, scheduler.state.survival = cost, curves
    random = np.random.default_rng(seed)
    scheduler.add([request(i, int(random.integers(1, 40)), max_tokens=30) for i in range(60)])
    for _ in range(num_steps):
        while scheduler.has_room and (step := scheduler.next_step()):
            pipeline.submit(step)
        if scheduler.num_in_flight:
            scheduler.record(pipeline.collect())
    return scheduler.state


STATES = st.builds(
    state_after,
    st.integers(0, 60),
    st.integers(0, 1000),
    st.sampled_from(["none", "batch", "layer"]),
    st.sampled_from([None, COST]),
    st.sampled_from([None, CURVES]),
)


@every_policy
@settings(max_examples=30)
@given(state=STATES)
def test_a_shape_keeps_to_the_capacity(make: type[Policy], state: SchedulerState) -> None:
    policy = make()
    for _ in range(3):  # a policy may change its phase from step to step
        shape = policy.choose(state)
        assert 0 <= shape.num_decodes <= state.capacity.max_batch_sequences
        assert 0 <= shape.num_prefill_tokens <= state.capacity.max_step_tokens


@every_policy
@settings(max_examples=30)
@given(state=STATES)
def test_a_request_is_admitted_only_where_its_tokens_find_room(make: type[Policy], state: SchedulerState) -> None:
    policy = make()
    policy.choose(state)
    for sequence in list(state.waiting)[:8]:
        if policy.admits(state, sequence):
            num_blocks = state.ledger.new_blocks_for(sequence.prompt, sequence.num_tokens)
            assert num_blocks <= state.ledger.num_free
            assert len(state.running) < state.max_running


@every_policy
@settings(max_examples=30)
@given(state=STATES, num_decodes=st.integers(0, 20), context_tokens=st.floats(0, 1000))
def test_selected_are_candidates_once_each(
    make: type[Policy], state: SchedulerState, num_decodes: int, context_tokens: float
) -> None:
    candidates = list(state.ready)
    selected = make().select(state, candidates, num_decodes, context_tokens)
    assert len(selected) == min(num_decodes, len(candidates))
    assert_distinct_members(selected, candidates)


@every_policy
@settings(max_examples=30)
@given(state=STATES, limit_blocks=st.integers(0, 60), max_sequences=st.integers(0, 12), num_resident=st.integers(0, 8))
def test_a_prefetch_keeps_to_its_window(
    make: type[Policy], state: SchedulerState, limit_blocks: int, max_sequences: int, num_resident: int
) -> None:
    ready = list(state.ready)
    resident, absent = ready[:num_resident], ready[num_resident:]
    if not absent:
        return
    window = PrefetchWindow(
        absent=absent,
        limit_blocks=limit_blocks,
        max_sequences=max_sequences,
        num_missing_blocks=lambda sequence: state.ledger.num_owned(sequence.sequence_id),
        resident=resident,
        num_prefill_tokens=0,
        step=max(sequence.last_step for sequence in absent) + 1,
        num_batches=state.capacity.max_batches,
        num_steps_in_time=0,
    )
    policy = make()
    for _ in range(8):  # beyond PipeMax's warm-up
        selected = policy.select_prefetch(state, window)
        assert len(selected) <= max_sequences
        assert_distinct_members(selected, absent)
        assert sum(map(window.num_missing_blocks, selected)) <= limit_blocks


def assert_distinct_members(selected: Sequence[SequenceState], candidates: Sequence[SequenceState]) -> None:
    ids = [sequence.sequence_id for sequence in selected]
    assert len(set(ids)) == len(ids)
    assert set(ids) <= {sequence.sequence_id for sequence in candidates}
