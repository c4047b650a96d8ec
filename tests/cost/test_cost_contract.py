"""What `CostModel` promises, kept by rooflines, profiles, online costs and the tests' own formula.

Once an online cost has measured steps, its lines may fall where the measured seconds fell.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchpipe.cost.hardware import load_hardware
from batchpipe.cost.model import CostModel, KvLink, StepWork, bottleneck_seconds
from batchpipe.cost.online import OnlineCost
from batchpipe.cost.profile_cost import ProfileCost
from batchpipe.cost.roofline import RooflineCost
from tests.cost.formula_cost import FormulaCost
from tests.cost.published_shapes import KNOWN_SHAPES
from tests.cost.test_profile import PROFILE

FOUR = load_hardware("4xa100-pcie")
PROFILED = ProfileCost(PROFILE, [range(2), range(2, 4), range(4, 6)])
FORMULA = FormulaCost(
    lambda stage, work: (stage + 1) * (1e-3 + 1e-5 * work.num_tokens + 1e-8 * work.decode_context_tokens),
    num_stages=2,
    handoff_seconds_per_token=1e-6,
)

every_cost = pytest.mark.parametrize(
    "cost",
    [
        *(
            pytest.param(RooflineCost.pipeline(FOUR, KNOWN_SHAPES[name]), id=f"roofline-{name}")
            for name in KNOWN_SHAPES
        ),
        *(
            pytest.param(RooflineCost.tensor_parallel(FOUR, KNOWN_SHAPES[name]), id=f"roofline-sharded-{name}")
            for name in KNOWN_SHAPES
        ),
        pytest.param(PROFILED, id="profile"),
        pytest.param(ProfileCost(PROFILE, [range(6)], random_share=0.5), id="profile-one-stage"),
        pytest.param(OnlineCost(PROFILED), id="online"),
        pytest.param(FORMULA, id="formula"),
        pytest.param(replace(FORMULA, kv_links=(KvLink(1e9, 1e9, 128, 4),) * 2), id="formula-links"),
    ],
)


def work_of(num_prefilled: int, num_drawn: int, num_decodes: int, context_each: int, prefill_pairs: int) -> StepWork:
    num_tokens = max(1, num_prefilled + num_decodes)
    return StepWork(num_tokens, num_drawn, num_decodes, num_decodes * (context_each + 1), prefill_pairs)


WORKS = st.builds(
    work_of,
    num_prefilled=st.integers(0, 4096),
    num_drawn=st.integers(0, 512),
    num_decodes=st.integers(0, 512),
    context_each=st.integers(0, 4000),
    prefill_pairs=st.integers(0, 10_000_000),
)


def with_more(work: StepWork, quantity: str, more: int) -> StepWork:
    """Only this quantity grows, but decodes come with their context, the same for each."""
    larger = replace(work, **{quantity: getattr(work, quantity) + more})
    if quantity != "num_decodes":
        return larger
    context_each = work.decode_context_tokens // work.num_decodes if work.num_decodes else 1
    return replace(larger, decode_context_tokens=larger.num_decodes * context_each)


@every_cost
@pytest.mark.parametrize("quantity", StepWork.__dataclass_fields__)
@given(work=WORKS, more=st.integers(1, 2000))
def test_steps_take_time_and_larger_ones_no_less(cost: CostModel, quantity: str, work: StepWork, more: int) -> None:
    larger = with_more(work, quantity, more)
    for stage in range(cost.num_stages):
        # But for the rounding of a table's lines.
        assert 0 < cost.stage_seconds(stage, work) <= cost.stage_seconds(stage, larger) * (1 + 1e-12)


@every_cost
@given(work=WORKS)
def test_the_distinct_stages_stand_for_all(cost: CostModel, work: StepWork) -> None:
    seconds = [cost.stage_seconds(stage, work) for stage in range(cost.num_stages)]
    assert {seconds[stage] for stage in cost.distinct_stages} == set(seconds)
    assert bottleneck_seconds(cost, work) == max(seconds)


@every_cost
@given(num_tokens=st.integers(1, 4096), more=st.integers(1, 4096))
def test_more_hidden_states_take_longer(cost: CostModel, num_tokens: int, more: int) -> None:
    assert 0 < cost.handoff_seconds(num_tokens) < cost.handoff_seconds(num_tokens + more)


@every_cost
def test_links_are_known_of_every_stage_or_of_none(cost: CostModel) -> None:
    assert len(cost.kv_links) in (0, cost.num_stages)
    assert cost.control_seconds >= 0
