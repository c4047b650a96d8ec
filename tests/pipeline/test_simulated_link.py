"""The second tier on the clock, by hand. A layer's KV of a block takes a second to load and two rows one to store."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from batchpipe.cost.model import KvLink
from batchpipe.pipeline.simulated import SimulatedPipeline
from batchpipe.pipeline.simulated_link import CopyEngineClock, LinkClock, Moved
from batchpipe.scheduler.offload.prefetch_budget import PrefetchBudget
from batchpipe.types import LinkUse, StepResult, Transfers
from tests.cost.formula_cost import FormulaCost
from tests.pipeline.simulated_cases import EOS, capacity, idle_seconds, step_of, token_cost

# Blocks of 4 tokens with a byte a token in each of two layers.
LINK = KvLink(load_bytes_per_second=8.0, store_bytes_per_second=4.0, kv_bytes_per_token_layer=1, num_layers=2)
NO_ROWS = replace(LINK, store_bytes_per_second=2.0**40)  # so fast that stores end with their step, to a part in 10^11


def moves(
    *,
    loads: tuple[int, ...] = (),
    streams: tuple[int, ...] = (),
    writes: int = 0,
    copies: tuple[tuple[int, int], ...] = (),
) -> Transfers:
    """Host blocks to load and to stream; the step's new tokens are written to host block `writes` and those after."""
    return Transfers(
        host_tables=np.arange(writes, writes + 16, dtype=np.int32)[None],
        loads=np.array([(block, block) for block in loads], np.int32).reshape(-1, 2),
        staging_tables=np.full((1, 16), -1, np.int32),
        staged_blocks=np.array(streams, np.int32),
        staging_blocks=np.zeros(len(streams), np.int32),
        host_copies=np.array(copies, np.int32).reshape(-1, 2),
    )


def tiered(cost: FormulaCost, **changes: int) -> SimulatedPipeline:
    offered = capacity(cost.num_stages, **({"num_host_blocks": 100, "streams_per_block": 1} | changes))
    return SimulatedPipeline(offered, cost, dict.fromkeys(range(100), 50), EOS)


def stalls(result: StepResult) -> tuple[float, ...]:
    return tuple(use.stall_seconds for use in result.link_uses)


def test_a_lane_fills_gaps_behind_what_was_promised_before() -> None:
    engine = CopyEngineClock()
    assert engine.carry(0.0, 2.0) == 2.0
    assert engine.carry(4.0, 1.0) == 5.0
    assert engine.carry(1.0, 3.0) == 6.0  # from 2 to 4, and from 5 to 6
    assert engine.carry(0.0, 1.0) == 7.0
    assert engine.carry(9.0, 1.0) == 10.0
    engine.forget(8.0)
    assert engine.carry(8.0, 2.0) == 11.0


def test_one_stage_loads_beside_the_step_before() -> None:
    """A block takes a second, and a token's computing. Two batches circulate, so the second step is known early."""
    pipeline = tiered(token_cost((1.0,), kv_links=(NO_ROWS,)), max_batches=2)
    # Nothing computes beside its loads, so they come by layer: 0 to 1 and 1 to 2; computes 1 to 5.
    pipeline.submit(step_of(0, 4, transfers=moves(loads=(50, 51))))
    pipeline.submit(step_of(1, 4, transfers=moves(loads=(52, 53, 54), writes=20)))  # loads 2 to 5, computes 5 to 9
    first, second = pipeline.collect(), pipeline.collect()
    assert first.stage_seconds == (5.0,)
    assert first.link_uses == (LinkUse(1.0, 16, 8, 2.0, 8 / 2.0**40),)
    assert second.stage_seconds == (4.0,)
    assert stalls(second) == (0.0,)


def test_loads_begin_once_the_step_before_the_previous_one_is_computed() -> None:
    pipeline = tiered(token_cost((1.0,), kv_links=(NO_ROWS,)), max_batches=3)
    pipeline.submit(step_of(0, 4, transfers=moves()))  # 0 to 4
    pipeline.submit(step_of(1, 4, transfers=moves(writes=20)))  # 4 to 8
    # Loads 4 to 11, computes 11 to 12.
    pipeline.submit(step_of(2, 1, transfers=moves(loads=tuple(range(50, 57)), writes=40)))
    assert [stalls(pipeline.collect()) for _ in range(3)] == [(0.0,), (0.0,), (3.0,)]
    assert pipeline.stages.now_seconds == 12.0
    assert pipeline.stages.busy_seconds == (9.0,)
    assert idle_seconds(pipeline) == (3.0,)


def test_loads_begin_once_their_step_is_submitted() -> None:
    pipeline = tiered(token_cost((1.0,), control_seconds=0.5, kv_links=(NO_ROWS,)), max_batches=2)
    pipeline.submit(step_of(0, 4, transfers=moves()))  # 0 to 4
    pipeline.collect()
    # Decided at 4.5, when nothing computes any more: the first layer's load until 5, computes until 6.
    pipeline.submit(step_of(1, 1, transfers=moves(loads=(50,), writes=20)))
    assert stalls(pipeline.collect()) == (0.5,)
    assert pipeline.stages.now_seconds == 6.0


def test_a_load_by_layer_runs_ahead_of_the_layers_that_compute() -> None:
    """Three layers compute for 1, 1 and 1; their loads take 2 each: the last comes at 6. Whole, they would end at 9."""
    link = replace(NO_ROWS, num_layers=3, load_bytes_per_second=4.0)
    pipeline = tiered(token_cost((3.0,), kv_links=(link,)), max_batches=2)
    pipeline.submit(step_of(0, 1, transfers=moves(loads=(50, 51))))
    assert pipeline.collect().stage_seconds == (7.0,)
    # Six seconds to compute: the second layer's streams and loads are there at 4, the third's streams once the first
    # layer is computed, at 4, from 4 to 5, and its loads by then: only the first layer's 2 are waited for.
    pipeline = tiered(token_cost((6.0,), kv_links=(link,)), max_batches=2)
    pipeline.submit(step_of(0, 1, transfers=moves(loads=(50,), streams=(51,))))
    assert pipeline.collect().stage_seconds == (8.0,)


def test_rows_go_to_the_host_behind_their_step_and_two_buffers_bound_them() -> None:
    """A row takes half a second, a token's computing an eighth."""
    pipeline = tiered(token_cost((0.125,), kv_links=(LINK,)), max_batches=4)
    for step in range(4):
        pipeline.submit(step_of(step, 8, transfers=moves(writes=4 * step)))
    # Computes 0 to 1, stores 1 to 5; computes 1 to 2, stores 5 to 9; computes 5 to 6, 9 to 10.
    results = [pipeline.collect() for _ in range(4)]
    assert [stalls(result) for result in results] == [(0.0,), (0.0,), (3.0,), (3.0,)]
    assert [step.end_seconds for step in pipeline.steps] == [1.0, 2.0, 6.0, 10.0]
    assert results[0].link_uses[0] == LinkUse(0.0, 0, 16, 0.0, 4.0)


def test_what_was_just_written_is_loaded_once_it_is_on_the_host() -> None:
    pipeline = tiered(token_cost((1.0,), kv_links=(LINK,)))
    pipeline.submit(step_of(0, 2, transfers=moves(writes=7, copies=((90, 91),))))  # 0 to 2, stores 2 to 3
    pipeline.collect()
    # Its first layer's load 3 to 3.5, computes until 4.5.
    pipeline.submit(step_of(0, 1, 2, starts=False, transfers=moves(loads=(7,), writes=7)))
    assert stalls(pipeline.collect()) == (1.5,)
    # Another block: 4.5 to 5.
    pipeline.submit(step_of(0, 1, 3, starts=False, transfers=moves(loads=(8,), writes=7)))
    assert stalls(pipeline.collect()) == (0.5,)
    # Copies within the host are behind their step's rows, too.
    pipeline = tiered(token_cost((1.0,), kv_links=(LINK,)))
    pipeline.submit(step_of(0, 2, transfers=moves(writes=7, copies=((90, 91),))))
    pipeline.collect()
    pipeline.submit(step_of(0, 1, 2, starts=False, transfers=moves(loads=(91,), writes=7)))
    assert stalls(pipeline.collect()) == (1.5,)


@pytest.mark.parametrize(
    ("num_layers", "work_seconds", "num_streams", "seconds"),
    [
        # A layer computes for 2; its streams take 1: only the first is waited for.
        (4, 8.0, 1, 1.0 + 8.0),
        (2, 8.0, 1, 1.0 + 8.0),
        # Streams take 4 a layer, one after the other until 16; the last is computed until 18.
        (4, 8.0, 4, 18.0),
        # As long as computing: the last of three comes until 24.
        (3, 24.0, 8, 24.0 + 8.0),
        # 5 and 4 a layer: 0 to 5, 5 to 10, and the third only once the first is computed, at 9.
        (3, 12.0, 5, 15.0 + 4.0),
    ],
)
def test_streams_pass_layer_by_layer(num_layers: int, work_seconds: float, num_streams: int, seconds: float) -> None:
    """A layer of a block takes a second."""
    link = replace(NO_ROWS, num_layers=num_layers, load_bytes_per_second=4.0)
    pipeline = tiered(token_cost((work_seconds,), kv_links=(link,)))
    pipeline.submit(step_of(0, 1, transfers=moves(streams=tuple(range(50, 50 + num_streams)))))
    result = pipeline.collect()
    assert result.stage_seconds == (seconds,)
    assert result.link_uses[0].loaded_bytes == num_streams * 4 * num_layers
    assert result.link_uses[0].load_seconds == num_streams * num_layers
    assert stalls(result) == (seconds - work_seconds,)


def test_a_layers_slot_is_free_when_the_layer_two_before_it_is_computed() -> None:
    """Layers take 1 to stream and 2 to compute: 0 to 1, 1 to 2, then 3 to 4 and 5 to 6, so the link is idle between."""
    clock = LinkClock(replace(NO_ROWS, num_layers=4, load_bytes_per_second=4.0), 4, 100)
    assert clock.run(Moved.of(step_of(0, 1, transfers=moves(streams=(50,))), 4), 0.0, 0.0, 8.0)[0] == 9.0
    # 8 to load: from 4.5 to 5, then from 6 to 13.5.
    end, use = clock.run(Moved.of(step_of(1, 1, transfers=moves(loads=(51, 52))), 4), 4.5, 9.0, 1.0)
    assert (end, use.stall_seconds) == (14.5, 4.5)


def test_loads_fill_the_gaps_that_streams_leave() -> None:
    """Layers take 1 to stream and 2 to compute: 0 to 1, 1 to 2, 3 to 4, 5 to 6; the step ends at 9."""
    link = replace(NO_ROWS, num_layers=4, load_bytes_per_second=4.0)
    pipeline = tiered(token_cost((8.0,), kv_links=(link,)), max_batches=2)
    pipeline.submit(step_of(0, 1, transfers=moves(streams=(50,))))
    # 8 to load: 2 to 3, 4 to 5, 6 to 12.
    pipeline.submit(step_of(1, 1, transfers=moves(loads=(51, 52), writes=20)))
    assert stalls(pipeline.collect()) == (1.0,)
    assert stalls(pipeline.collect()) == (3.0,)
    assert pipeline.stages.now_seconds == 20.0


def test_three_stages_with_links_of_their_own() -> None:
    """A block takes 1, 2 and 1 to load on the three stages, a token 1, 2 and 1 to compute, a hand-off a half."""
    links = (NO_ROWS, replace(NO_ROWS, load_bytes_per_second=4.0), NO_ROWS)
    pipeline = tiered(token_cost((1.0, 2.0, 1.0), fixed_handoff_seconds=0.5, kv_links=links))
    # Loads by layer 0 to 3, 0 to 6, 0 to 3; computes 1.5 to 2.5 and 3 to 4, 4.5 to 8.5, 9 to 11.
    pipeline.submit(step_of(0, 2, transfers=moves(loads=(50, 51, 52))))
    # Streams behind the loads until 5, 10 and 5; computes 4 to 4.5 and 5 to 5.5, 8.5 to 9.5 and 10 to 11, 11.5 to 12.5.
    pipeline.submit(step_of(1, 1, transfers=moves(streams=(53, 54), writes=20)))
    # Loads 5 to 9, 10 to 18, 11 to 15; computes 9 to 10 (due 5.5), 18 to 20 (due 11), 20.5 to 21.5.
    pipeline.submit(step_of(2, 1, transfers=moves(loads=(55, 56, 57, 58), writes=40)))
    results = [pipeline.collect() for _ in range(3)]
    assert [stalls(result) for result in results] == [(2.0, 0.0, 0.0), (0.5, 0.5, 0.0), (3.5, 7.0, 0.0)]
    assert [result.stage_seconds for result in results] == [(4.0, 4.0, 2.0), (1.5, 2.5, 1.0), (4.5, 9.0, 1.0)]
    assert [step.end_seconds for step in pipeline.steps] == [11.0, 12.5, 21.5]
    assert [use.load_seconds for use in results[2].link_uses] == [4.0, 8.0, 4.0]
    assert pipeline.stages.busy_seconds == (4.0, 8.0, 4.0)


def test_the_links_noise_leaves_the_mean_time_as_it_is() -> None:
    cost, seconds = token_cost((1.0,), kv_links=(NO_ROWS,)), []
    offered = capacity(num_host_blocks=100)
    pipeline = SimulatedPipeline(offered, cost, dict.fromkeys(range(4000), 9), EOS, noise=0.5, seed=3)
    for step_id in range(4000):
        pipeline.submit(step_of(step_id, 1, transfers=moves(loads=(50,))))
        seconds.append(pipeline.collect().link_uses[0].load_seconds)
    assert np.mean(seconds) == pytest.approx(1.0, rel=0.03)
    assert np.std(seconds) > 0.4


def test_links_may_carry_less_than_the_cost_model_believes() -> None:
    cost = token_cost((1.0,), kv_links=(NO_ROWS,))
    slow = replace(NO_ROWS, load_bytes_per_second=2.0)
    pipeline = SimulatedPipeline(capacity(num_host_blocks=100), cost, {0: 50}, EOS, links=[slow])
    pipeline.submit(step_of(0, 1, transfers=moves(loads=(50,))))
    assert pipeline.collect().link_uses[0].load_seconds == 4.0


def test_what_breaks_the_port_is_noticed() -> None:
    one_tier = SimulatedPipeline(capacity(), token_cost((1.0,)), {0: 50}, EOS)
    with pytest.raises(AssertionError, match="second tier"):
        one_tier.submit(step_of(0, 1, transfers=moves()))
    with pytest.raises(AssertionError, match="second tier"):
        tiered(token_cost((1.0,), kv_links=(LINK,))).submit(step_of(0, 1))
    with pytest.raises(AssertionError, match="nothing is known of the links"):
        tiered(token_cost((1.0,)))


@pytest.mark.parametrize("believed", [0.25, 1.0, 4.0])
def test_a_budget_of_loads_fills_the_link_and_hardly_stalls(believed: float) -> None:
    """Two batches in flight; a step computes for 4 seconds, in which a link with noise carries 400 blocks."""
    link = replace(NO_ROWS, load_bytes_per_second=800.0)
    cost = token_cost((4.0,), kv_links=(replace(link, load_bytes_per_second=believed * 800.0),))
    offered = capacity(num_host_blocks=8000, max_batches=2)
    pipeline = SimulatedPipeline(offered, cost, dict.fromkeys(range(1000), 9), EOS, links=[link], noise=0.05)
    budget, loaded, stalled = PrefetchBudget(cost, offered.block_tokens), [], []
    for step_id in range(400):
        loaded.append(budget.blocks(4.0))
        pipeline.submit(step_of(step_id, 1, transfers=moves(loads=tuple(range(100, 100 + loaded[-1])))))
        if step_id > 0:
            result = pipeline.collect()
            budget.observe(loaded[-2], result.stage_seconds, result.link_uses)
            stalled.append(stalls(result)[0])
    assert 0.9 * 400 <= np.mean(loaded[50:]) <= 1.02 * 400
    assert np.mean(stalled[50:]) <= 0.02 * 4.0
