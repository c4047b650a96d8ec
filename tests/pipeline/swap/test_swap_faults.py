"""What goes wrong between two tiers of KV is found, and named for whoever meets it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from batchpipe.pipeline.swap.copy_engine import EmulatedLink, Fault
from batchpipe.types import Step
from tests.pipeline.swap.swap_pipelines import NUM_STEPS, open_pipeline, program, run
from tests.pipeline.swap.swap_programs import (
    BLOCK_TOKENS,
)


def step_that_loads(steps: Sequence[Step], num_before: int = 5) -> Step:
    return next(s for s in steps if s.step_id >= num_before and s.transfers is not None and len(s.transfers.loads))


@pytest.mark.parametrize("kind", ["wrong_source", "wrong_target", "late"])
@pytest.mark.parametrize(("num_stages", "max_batches"), [(1, 1), (2, 3)])
def test_a_load_that_goes_wrong_is_found(kind: str, num_stages: int, max_batches: int) -> None:
    steps, _ = program(4, num_stages, max_batches, "loads", "cpu")
    step = step_that_loads(steps)
    assert step.transfers is not None
    host_block, block = step.transfers.loads[0].tolist()
    link = EmulatedLink(faults=(Fault(kind, step.step_id),))  # type: ignore[arg-type]
    with open_pipeline(num_stages, max_batches, attention="cpu", link=link) as pipeline:
        results = run(pipeline, steps[: step.step_id + 1])
    assert not any(result.corrupt for result in results[:-2])
    # What goes to the wrong place, beside the step before, may meet a block that this one reads.
    assert kind == "wrong_target" or not results[-2].corrupt
    users = {
        sequence_id
        for sequence_id, table, n in zip(
            step.sequence_ids, step.block_tables, step.context_lengths + step.query_lengths, strict=True
        )
        if block in table[: -(-n // BLOCK_TOKENS)]
    }
    message = f"stage 0: the KV of host block {host_block} came back changed to device block {block}"
    assert {i: text for i, text in results[-1].corrupt.items() if i in users} == dict.fromkeys(users, message)
    assert users


@pytest.mark.parametrize(("mode", "workers"), [("loads", False), ("streams", False), ("both", True)])
def test_a_bit_that_flips_on_the_host_is_found_when_it_comes_back(mode: str, workers: bool) -> None:
    steps, expected = program(5, 1, 2, mode, "cpu")
    # Every step's first token, until one of them has come back.
    link = EmulatedLink(faults=tuple(Fault("flipped", step_id) for step_id in range(NUM_STEPS)))
    with open_pipeline(1, 2, attention="cpu", link=link, workers=workers) as pipeline:
        results = run(pipeline, steps)
    corrupt = {sequence_id for result in results for sequence_id in result.corrupt}
    assert corrupt
    assert all("came back" in text for result in results for text in result.corrupt.values())
    sound = [result for result in results if not result.corrupt]
    for result in sound:  # nobody else met it
        assert result.logprobs == expected[result.step_id].logprobs


def test_with_verification_off_nothing_is_found() -> None:
    steps, _ = program(4, 1, 1, "loads", "cpu")
    step = step_that_loads(steps)
    link = EmulatedLink(faults=(Fault("late", step.step_id),))
    with open_pipeline(1, 1, attention="cpu", kv_verify="off", link=link) as pipeline:
        assert not any(result.corrupt for result in run(pipeline, steps))
