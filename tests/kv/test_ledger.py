from hypothesis import given
from hypothesis import strategies as st

from batchpipe.kv.ledger import BlockLedger


def test_grow_gives_only_what_is_missing() -> None:
    ledger = BlockLedger(num_blocks=4, block_tokens=16)
    assert len(ledger.grow(7, 17) or []) == 2
    assert ledger.grow(7, 32) == []
    assert len(ledger.grow(7, 33) or []) == 1
    assert ledger.num_free == 1
    assert ledger.peak_used_blocks == 3


def test_grow_changes_nothing_where_blocks_are_short() -> None:
    ledger = BlockLedger(num_blocks=2, block_tokens=4)
    ledger.grow(1, 4)
    assert ledger.grow(2, 8) is None
    assert ledger.num_free == 1
    assert ledger.owned(2) == ()
    ledger.check_integrity()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 40)), max_size=60))
def test_no_block_is_lost_or_shared(actions: list[tuple[bool, int, int]]) -> None:
    ledger = BlockLedger(num_blocks=16, block_tokens=4)
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
