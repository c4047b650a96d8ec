import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from batchpipe.kv.block_manager import BlockManager
from batchpipe.types import Int32Array


def test_grow_gives_only_what_is_missing() -> None:
    ledger = BlockManager(num_blocks=4, block_tokens=16)
    assert len(ledger.grow(7, 17) or []) == 2
    assert ledger.grow(7, 32) == []
    assert len(ledger.grow(7, 33) or []) == 1
    assert ledger.num_free == 1
    assert ledger.peak_used_blocks == 3


def test_grow_changes_nothing_where_blocks_are_short() -> None:
    ledger = BlockManager(num_blocks=2, block_tokens=4)
    ledger.grow(1, 4)
    assert ledger.grow(2, 8) is None
    assert ledger.num_free == 1
    assert ledger.owned(2) == ()
    ledger.check_integrity()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 40)), max_size=60))
def test_no_block_is_lost_or_shared(actions: list[tuple[bool, int, int]]) -> None:
    ledger = BlockManager(num_blocks=16, block_tokens=4)
    held: dict[int, int] = {}
    for grows, sequence_id, num_tokens in actions:
        if grows:
            if ledger.grow(sequence_id, num_tokens) is not None:
                held[sequence_id] = max(held.get(sequence_id, 0), ledger.blocks_for(num_tokens))
        else:
            ledger.release(sequence_id)
            held.pop(sequence_id, None)
        ledger.check_integrity()
        assert {i: ledger.num_owned(i) for i in held} == held
        assert ledger.num_used == sum(held.values())


def prompt_of(*parts: int) -> Int32Array:
    """Blocks of four tokens, each made of one number."""
    return np.repeat(np.array(parts, np.int32), 4)


def test_a_common_beginning_is_owned_by_both() -> None:
    ledger = BlockManager(num_blocks=8, block_tokens=4)
    first, second = prompt_of(1, 2, 3), prompt_of(1, 2, 4)
    blocks = ledger.grow(0, 12)
    assert blocks is not None
    ledger.learn(0, first, 12)
    assert ledger.new_blocks_for(second, 12) == 1
    assert ledger.share(1, second, 12) == tuple(blocks[:2])
    assert len(ledger.grow(1, 12) or []) == 1
    assert ledger.num_used == 4
    ledger.release(0)
    assert ledger.num_used == 3
    ledger.check_integrity()


def test_the_last_token_is_never_shared() -> None:
    ledger = BlockManager(num_blocks=8, block_tokens=4)
    ledger.grow(0, 8)
    ledger.learn(0, prompt_of(1, 2), 8)
    assert len(ledger.share(1, prompt_of(1, 2), 8)) == 1


def test_what_was_shared_is_kept_until_its_room_is_needed() -> None:
    ledger = BlockManager(num_blocks=4, block_tokens=4)
    prompt = prompt_of(1, 2, 3)
    ledger.grow(0, 12)
    ledger.learn(0, prompt, 12)
    ledger.share(1, prompt, 12)
    ledger.release(0)
    ledger.release(1)
    assert ledger.num_free == 4
    assert len(ledger.share(2, prompt, 12)) == 2
    ledger.release(2)
    ledger.check_integrity()
    assert ledger.grow(3, 12) is not None
    assert len(ledger.share(4, prompt, 12)) == 1
    ledger.check_integrity()


def test_what_nobody_shared_is_free_at_once() -> None:
    ledger = BlockManager(num_blocks=4, block_tokens=4)
    ledger.grow(0, 12)
    ledger.learn(0, prompt_of(1, 2, 3), 12)
    ledger.release(0)
    assert ledger.share(1, prompt_of(1, 2, 3), 12) == ()


def test_distrusted_blocks_are_shared_no_more() -> None:
    ledger = BlockManager(num_blocks=8, block_tokens=4)
    ledger.grow(0, 12)
    ledger.learn(0, prompt_of(1, 2, 3), 12)
    ledger.withdraw(0)
    assert ledger.share(1, prompt_of(1, 2, 3), 12) == ()
    ledger.check_integrity()


@given(
    st.lists(
        st.tuples(st.sampled_from("slrd"), st.integers(0, 5), st.lists(st.integers(0, 1), max_size=6)), max_size=80
    )
)
def test_shared_blocks_hold_what_their_owners_ask_for(actions: list[tuple[str, int, list[int]]]) -> None:
    ledger = BlockManager(num_blocks=12, block_tokens=4)
    contents: dict[int, tuple[int, ...]] = {}  # of a block: the whole beginning up to its end
    prompts: dict[int, list[int]] = {}
    for action, sequence_id, parts in actions:
        if action == "s" and sequence_id not in prompts and parts:
            prompt = prompt_of(*parts)
            expected = ledger.new_blocks_for(prompt, len(prompt))
            if expected > ledger.num_free:
                continue
            shared = ledger.share(sequence_id, prompt, len(prompt))
            assert all(contents[block] == tuple(parts[: i + 1]) for i, block in enumerate(shared))
            fresh = ledger.grow(sequence_id, len(prompt))
            assert fresh is not None
            prompts[sequence_id] = parts
            for i, block in enumerate(fresh, len(shared)):
                contents[block] = tuple(parts[: i + 1])
        elif action == "l" and sequence_id in prompts:
            ledger.learn(sequence_id, prompt_of(*prompts[sequence_id]), 4 * len(prompts[sequence_id]))
        elif action == "r":
            ledger.release(sequence_id)
            prompts.pop(sequence_id, None)
        elif action == "d" and sequence_id in prompts:
            ledger.withdraw(sequence_id)
        ledger.check_integrity()
