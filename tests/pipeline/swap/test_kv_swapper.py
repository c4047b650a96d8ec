"""Two tiers of KV say the same as one, whatever is loaded, streamed, copied and evicted."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.errors import MemoryLimitError
from batchpipe.pipeline.swap.copy_engine import EmulatedLink
from batchpipe.types import SequenceStart, Step, Transfers
from tests.pipeline.swap.swap_pipelines import MODES, assert_same, open_pipeline, program, run
from tests.pipeline.swap.swap_programs import (
    BLOCK_TOKENS,
    NUM_BLOCKS,
    on_the_device,
)
from tests.scheduler.scheduler_cases import sampling


@pytest.mark.parametrize("attention", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("num_stages", "max_batches", "mode"),
    [(1, 1, "loads"), (1, 1, "streams"), (1, 2, "both"), (2, 2, "both"), (2, 3, "streams"), (3, 4, "loads")],
)
def test_two_tiers_say_the_same_as_one(num_stages: int, max_batches: int, mode: str, attention: str) -> None:
    steps, expected = program(1, num_stages, max_batches, mode, attention)
    moved = [step.transfers for step in steps if step.transfers]
    assert any(len(one.loads) for one in moved) == (mode != "streams")
    assert any(len(one.staged_blocks) for one in moved) == (mode != "loads")
    assert any(len(one.host_copies) for one in moved)
    with open_pipeline(num_stages, max_batches, attention=attention) as pipeline:
        results = run(pipeline, steps)
    assert_same(results, expected)
    token_bytes = 2 * 2 * 16 * 4  # keys and values of two heads of 16 float32
    stored = sum(use.stored_bytes for result in results for use in result.link_uses)
    assert stored == sum(len(step.token_ids) for step in steps) * token_bytes * 4
    loaded = sum(use.loaded_bytes for result in results for use in result.link_uses)
    assert loaded == sum(len(one.loads) + len(one.staged_blocks) for one in moved) * BLOCK_TOKENS * token_bytes * 4
    assert sum(use.load_seconds for result in results for use in result.link_uses) > 0
    assert all(len(result.link_uses) == num_stages for result in results)


@settings(max_examples=8)
@given(
    seed=st.integers(0, 1 << 20),
    num_stages=st.integers(1, 2),
    more_batches=st.integers(0, 1),
    mode=st.sampled_from(sorted(MODES)),
)
def test_any_program(seed: int, num_stages: int, more_batches: int, mode: str) -> None:
    steps, expected = program(seed, num_stages, num_stages + more_batches, mode, "cpu")
    with open_pipeline(num_stages, num_stages + more_batches, attention="cpu") as pipeline:
        assert_same(run(pipeline, steps), expected)


@pytest.mark.parametrize(
    "link",
    [
        pytest.param(EmulatedLink(load_bytes_per_second=5e5), id="load"),
        pytest.param(EmulatedLink(store_bytes_per_second=5e5), id="store"),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_a_slow_link_changes_nothing_but_the_time(seed: int, link: EmulatedLink) -> None:
    """Slow enough that a step's transfers take longer than its computing."""
    steps, expected = program(seed, 2, 3, "both", "cpu")
    with open_pipeline(2, 3, attention="cpu", link=link) as pipeline:
        results = run(pipeline, steps)
    assert_same(results, expected)
    for use in [use for result in results for use in result.link_uses]:
        assert (use.load_seconds > 0) == (use.loaded_bytes > 0)


@pytest.mark.parametrize("workers", [False, True])
def test_host_memory_that_the_system_refuses_is_named(workers: bool) -> None:
    with pytest.raises(MemoryLimitError, match="engine.kv_host_memory: the system refuses"):
        open_pipeline(1, 1, workers=workers, num_host_blocks=1 << 38)


def one_row(
    step_id: int,
    sequence_id: int,
    token_ids: list[int],
    context: int,
    tables: tuple[list[int], list[int]],
    *,
    loads: list[list[int]] | None = None,
    copies: tuple[list[list[int]], list[list[int]]] = ([], []),
) -> Step:
    """A step of one sequence. tables, copies: of device and of host blocks."""

    def numbers(values: list[int] | list[list[int]], width: int = 2) -> np.ndarray:
        return np.array(values, np.int32).reshape(-1, width)

    return Step(
        step_id=step_id,
        sequence_ids=(sequence_id,),
        query_lengths=np.array([len(token_ids)], np.int32),
        context_lengths=np.array([context], np.int32),
        token_ids=np.array(token_ids, np.int32),
        block_tables=numbers(tables[0], len(tables[0])),
        samples=np.ones(1, np.bool_),
        copied_blocks=numbers(copies[0]),
        started=(SequenceStart(sequence_id, 0, sampling(logprobs=1), np.zeros(1, np.int32), ()),),
        transfers=Transfers(
            host_tables=numbers(tables[1], len(tables[1])),
            loads=numbers(loads or []),
            staging_tables=np.full((1, len(tables[0])), -1, np.int32),
            staged_blocks=np.zeros(0, np.int32),
            staging_blocks=np.zeros(0, np.int32),
            host_copies=numbers(copies[1]),
        ),
    )


def test_a_host_block_comes_back_only_once_it_was_copied() -> None:
    steps = [
        one_row(0, 7, [1, 2, 3, 4], 0, ([0], [20])),
        # Begins with the whole of the other's block, and writes to the next block alone.
        one_row(1, 8, [5], 4, ([1, 2], [21, 22]), copies=([[0, 1]], [[20, 21]])),
        one_row(2, 7, [6], 4, ([0, 3], [20, 23])),
        one_row(3, 8, [7], 5, ([4, 2], [21, 22]), loads=[[21, 4]]),
    ]
    with open_pipeline(1, 1, two_tiers=False) as pipeline:
        expected = run(pipeline, [on_the_device(step) for step in steps])
    with open_pipeline(1, 2, link=EmulatedLink(store_bytes_per_second=2e4)) as pipeline:
        assert_same(run(pipeline, steps), expected)


def test_a_block_that_comes_with_its_step_is_there_before_it_is_copied() -> None:
    """Nothing computes beside the load, so it would come layer by layer, behind the copy."""
    steps = [
        one_row(0, 7, [1, 2, 3, 4], 0, ([0], [20])),
        one_row(1, 8, [5], 4, ([1, 2], [21, 22]), loads=[[20, 4]], copies=([[4, 1]], [[20, 21]])),
        one_row(2, 8, [6], 5, ([1, 2], [21, 22])),
    ]
    with open_pipeline(1, 1, two_tiers=False) as pipeline:
        expected = run(pipeline, [on_the_device(step) for step in steps])
    with open_pipeline(1, 1, link=EmulatedLink(load_bytes_per_second=2e5)) as pipeline:
        assert_same(run(pipeline, steps), expected)


def test_processes_say_the_same() -> None:
    steps, expected = program(3, 2, 3, "both", "reference")
    with open_pipeline(2, 3, workers=True, link=EmulatedLink(1e8, 1e8)) as pipeline:
        results = run(pipeline, steps)
        assert_same(results, expected)
        assert all(len(result.link_uses) == 2 for result in results)
        pipeline.restart()
        assert_same(run(pipeline, steps), expected)


def test_threads_end_with_the_pipeline() -> None:
    before = threading.active_count()
    steps, _ = program(1, 1, 2, "both", "reference")
    with open_pipeline(1, 2) as pipeline:
        assert threading.active_count() == before + 2
        pipeline.submit(steps[0])  # and is never run
    assert threading.active_count() == before


def test_a_failure_of_the_link_is_raised() -> None:
    steps, _ = program(1, 1, 1, "loads", "reference")
    first = next(i for i, step in enumerate(steps) if step.transfers and len(step.transfers.loads))
    transfers = steps[first].transfers
    assert transfers is not None
    nowhere = transfers.loads.copy()
    nowhere[0, 1] = NUM_BLOCKS
    broken = replace(steps[first], transfers=replace(transfers, loads=nowhere))
    with open_pipeline(1, 1, kv_verify="off") as pipeline, pytest.raises(AssertionError):
        run(pipeline, [*steps[:first], broken])
