"""Two tiers: the same texts as with all KV on the device, whatever moves, and nothing is left behind."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from batchpipe.plan.schedules import SCHEDULES
from batchpipe.types import ErrorCode
from tests.plan.planner_cases import capacity, drive, expected, fake, planner_for, request


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=40),
    num_blocks=st.integers(6, 40),
    num_host_blocks=st.integers(40, 200),
    block_tokens=st.sampled_from([1, 3, 8]),
    max_batches=st.integers(1, 5),
    max_step_tokens=st.integers(8, 64),
    schedule=st.sampled_from(sorted(SCHEDULES)),
    offload=st.sampled_from(["batch", "layer", "both", "none"]),
    streams_per_block=st.sampled_from([1, 2, 5]),
    num_samples=st.integers(1, 4),
    num_shared=st.sampled_from([0, 9, 25]),
)
def test_every_row_ends_once_with_its_own_text(
    lengths: list[tuple[int, int]],
    num_blocks: int,
    num_host_blocks: int,
    block_tokens: int,
    max_batches: int,
    max_step_tokens: int,
    schedule: str,
    offload: str,
    streams_per_block: int,
    num_samples: int,
    num_shared: int,
) -> None:
    offered = capacity(
        num_blocks=num_blocks, num_host_blocks=num_host_blocks, block_tokens=block_tokens, max_batches=max_batches,
        max_step_tokens=max_step_tokens, offload=offload, streams_per_block=streams_per_block,
    )  # fmt: skip
    requests = [request(i, p, num_shared=num_shared, max_tokens=m, n=num_samples) for i, (p, m) in enumerate(lengths)]
    pipeline, planner = fake(offered), planner_for(offered, schedule)
    finished = drive(planner, pipeline, requests)
    assert sorted(f.request.key.index for f in finished) == list(range(len(requests)))
    assert planner.ledger.num_used == 0
    assert planner.pager is not None
    assert planner.pager.residency.num_used == 0
    num_kv_tokens = num_blocks * block_tokens
    for end in finished:
        whole = expected(end.request, pipeline)
        fits = len(end.request.prompt_token_ids) + len(whole.token_ids) - 1 <= num_kv_tokens
        for completion in end.completions:
            if fits:
                assert completion == whole
            elif completion != whole:  # passing through in layers, a sequence may become longer than the device holds
                assert completion.error_code is ErrorCode.KV_CAPACITY
                assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
