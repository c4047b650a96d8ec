"""The device's blocks against a plain model: what is resident has places, and no block is reused too early."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from batchpipe.kv.device_cache import DeviceCache

NUM_DEVICE, NUM_HOST = 24, 64
OWNED = {i: list(range(4 * i, 4 * i + 4)) for i in range(12)} | {12: [0, 1, 50, 51], 13: [0, 1, 2, 52], 14: [0, 53]}


def places(cache: DeviceCache, host_blocks: list[int]) -> list[int]:
    found: list[int] = cache.places(np.array(host_blocks)).tolist()
    return found


@given(st.lists(st.tuples(st.sampled_from(["enter", "leave", "touch", "lend", "step"]), st.integers(0, 14))))
def test_places_follow_the_residents_and_cold_blocks_are_unused_since(events: list[tuple[str, int]]) -> None:
    """Sequences 12 to 14 share blocks with sequence 0 and with each other."""
    cache = DeviceCache(NUM_DEVICE, NUM_HOST)
    step = 0
    used_steps: dict[int, int] = {}  # by device block
    residents: set[int] = set()

    def assert_cold(blocks: list[int]) -> None:
        """A transfer for this step runs beside the step before, so it may write to what step - 2 used last."""
        assert all(used_steps.get(block, -2) <= step - 2 for block in blocks)

    for kind, sequence in events:
        owned = OWNED[sequence]
        if kind == "step":
            step += 1
            cache.begin_step(step - 2)
        elif kind == "enter" and sequence not in residents and cache.num_missing(owned) <= cache.num_cold:
            missing = [block for block in owned if places(cache, [block]) == [-1]]
            taken = cache.enter(sequence, owned, step)
            assert taken[:, 0].tolist() == missing
            assert_cold(taken[:, 1].tolist())
            residents.add(sequence)
        elif kind == "leave":
            cache.leave(sequence)
            residents.discard(sequence)
        elif kind == "touch":
            cache.touch([sequence], step)
            if sequence in residents:
                used_steps.update(dict.fromkeys(places(cache, owned), step))
        elif kind == "lend" and cache.num_cold > 2:
            lent = cache.lend(2, step)
            assert_cold(lent)
            used_steps.update(dict.fromkeys(lent, step))
            step += 1
            cache.begin_step(step - 2)
        cache.check_integrity()
        assert set(cache.residents) == residents
        on_device = {block for resident in residents for block in OWNED[resident]}
        assert {block for block in range(NUM_HOST) if places(cache, [block]) != [-1]} == on_device
        assert cache.num_used == len(on_device) <= cache.peak_used_blocks


def test_the_latest_used_comes_first() -> None:
    cache = DeviceCache(NUM_DEVICE, NUM_HOST)
    for sequence in (3, 1, 2):
        cache.enter(sequence, OWNED[sequence], 0)
    cache.touch([1, 3], 5)
    assert list(cache.latest_first()) == [(3, 5), (1, 5), (2, -1)]


def test_what_a_step_computes_takes_blocks_that_transfers_may_not() -> None:
    cache = DeviceCache(8, NUM_HOST)
    cache.enter(1, OWNED[1], 0)
    cache.touch([1], 0)
    cache.begin_step(-1)
    cache.leave(1)
    assert (cache.num_cold, cache.num_free) == (4, 8)
    cache.enter(2, OWNED[2], 1)
    cache.extend(2, [40, 41, 42, 43])
    assert (cache.num_cold, cache.num_free, cache.num_used) == (0, 0, 8)


def test_lent_blocks_that_no_step_used_are_as_cold_as_they_were() -> None:
    cache = DeviceCache(8, NUM_HOST)
    cache.lend(5, 3)
    assert cache.num_cold == 3
    cache.take_back()
    assert cache.num_cold == 8
    cache.lend(5, 3)
    cache.begin_step(2)
    assert (cache.num_cold, cache.num_free) == (3, 8), "step 3 still uses them"
