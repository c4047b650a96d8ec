"""Checks of tokens are the same wherever the tokens lie, and differ where anything differs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batchpipe.kv.checksums import HostChecks, block_checks, row_weights, token_checks

L, H, R, D = 3, 2, 4, 8
WEIGHTS = row_weights(L, H, torch.device("cpu"))


def a_block(dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(L, 2, H, R, D, generator=torch.Generator().manual_seed(0)).to(dtype)


def written_out(block: torch.Tensor) -> list[int]:
    """The definition, number by number, in Python's integers."""
    integers = block.view({2: torch.int16, 4: torch.int32}[block.dtype.itemsize])
    checks = []
    for row in range(R):
        total = 0
        for layer in range(L):
            for part in range(2):
                for head in range(H):
                    bits = sum(integers[layer, part, head, row].tolist())
                    bits = (bits + 2**31) % 2**32 - 2**31
                    total += int(WEIGHTS[layer, part, head]) * bits
        checks.append((total + 2**63) % 2**64 - 2**63)
    return checks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tokens_blocks_and_layers_agree_with_the_definition(dtype: torch.dtype) -> None:
    block = a_block(dtype)
    expected = written_out(block)
    assert block_checks(block[None], WEIGHTS).tolist() == [expected]
    assert token_checks(block.permute(3, 0, 1, 2, 4), WEIGHTS).tolist() == expected
    assert token_checks(block.permute(3, 0, 1, 2, 4).contiguous(), WEIGHTS).tolist() == expected
    by_layer = [block_checks(block[None, i : i + 1], WEIGHTS[i : i + 1]) for i in range(L)]
    assert sum(by_layer).tolist() == [expected]  # type: ignore[union-attr]


def test_any_one_bit_is_seen_and_only_in_its_row() -> None:
    block = a_block()
    before = block_checks(block[None], WEIGHTS)
    random = np.random.default_rng(1)
    for _ in range(300):
        place = tuple(int(random.integers(size)) for size in block.shape)
        changed = block.clone()
        changed.view(torch.int16)[place] ^= 1 << int(random.integers(15))
        differs = (block_checks(changed[None], WEIGHTS) != before)[0].tolist()
        assert differs == [row == place[3] for row in range(R)]


def test_layers_heads_and_rows_in_another_order_are_seen() -> None:
    block = a_block()
    before = block_checks(block[None], WEIGHTS)
    for dimension in range(4):
        assert (block_checks(block.flip(dimension)[None], WEIGHTS) != before).any()
    assert (WEIGHTS % 2 != 0).all() and len(WEIGHTS.unique()) == WEIGHTS.numel()


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_only_known_tokens_are_compared() -> None:
    checks = HostChecks(6, R)
    checks.put(numbers(2, 2, 5), numbers(0, 1, 0), np.array([10, 11, 50]))
    found = np.array([[10, 11, 99, 99], [50, 1, 2, 3], [7, 7, 7, 7]])
    assert checks.look(numbers(2, 5, 0)).differ(found).tolist() == [False, False, False]
    found[0, 1] = 12
    assert checks.look(numbers(2, 5, 0)).differ(found).tolist() == [True, False, False]


def test_a_block_that_is_begun_anew_forgets_and_a_copied_one_is_as_its_source() -> None:
    checks = HostChecks(6, R)
    checks.put(numbers(1, 1, 1), numbers(0, 1, 2), np.array([1, 2, 3]))
    checks.copy(np.array([[1, 4]], np.int32))
    before = checks.look(numbers(4))
    checks.put(numbers(1), numbers(0), np.array([8]))
    assert checks.look(numbers(1)).differ(np.array([[8, 0, 0, 0]])).tolist() == [False]
    assert checks.look(numbers(4)).differ(np.array([[1, 2, 4, 0]])).tolist() == [True]
    checks.put(numbers(4, 4), numbers(0, 1), np.array([0, 0]))
    assert before.differ(np.array([[1, 2, 3, 0]])).tolist() == [False]  # as it was when it was looked at
