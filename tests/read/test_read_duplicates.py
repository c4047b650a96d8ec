"""Ids seen before: the same answers as a set, whatever was spilled and merged."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import xxhash

from batchpipe.read import duplicates
from batchpipe.read.duplicates import SeenIds


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "RECENT_IDS", 64)
    monkeypatch.setattr(duplicates, "MERGE_IDS", 128)


def test_first_and_later_in_one_batch_and_across_batches() -> None:
    seen = SeenIds()
    assert seen.add_batch(["a", "b", "a"]) == [False, False, True]
    assert seen.add_batch(["c", "b"]) == [False, True]
    assert seen.add_batch([]) == []


def test_equals_a_set_through_many_spills(small: None, tmp_path: Path) -> None:
    draw = random.Random(7)
    seen, expected = SeenIds(tmp_path), set()
    for _ in range(400):
        ids = [f"row-{draw.randrange(20_000)}" for _ in range(draw.randrange(1, 60))]
        answers = seen.add_batch(ids)
        for row_id, answer in zip(ids, answers, strict=True):
            assert answer == (row_id in expected)
            expected.add(row_id)
    assert len(seen._runs) > 1
    assert sum(run.shape[1] for run in seen._runs) + len(seen._recent) >= len(expected)
    assert list(tmp_path.iterdir()) == []  # the spilled files have no names to be left behind


def test_hashes_that_share_one_half_are_told_apart(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xxhash, "xxh3_128_digest", lambda raw: b"samehalf" + int(raw).to_bytes(8, "little"))
    seen = SeenIds()
    assert not any(seen.add_batch([str(n) for n in range(200)]))
    assert seen.add_batch(["199", "200", "0", "200"]) == [True, False, True, True]
