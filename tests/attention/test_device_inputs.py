"""A step's indices as the GPU's kernels read them, in one buffer; here the device is the CPU."""

from __future__ import annotations

import numpy as np
import torch

from batchpipe.attention import device_inputs
from batchpipe.attention.device_inputs import CHUNK_TOKENS, DeviceInputs, DeviceStepInputs, Padding

BLOCK_TOKENS, TILE = 4, 8


def step_inputs(max_tokens: int = 64, max_sequences: int = 8) -> DeviceStepInputs:
    return DeviceStepInputs(
        torch.device("cpu"), BLOCK_TOKENS, max_tokens=max_tokens, max_sequences=max_sequences, tile_queries=TILE
    )


def fill(
    inputs: DeviceStepInputs, new: list[int], context: list[int], width: int, padding: Padding | None = None
) -> DeviceInputs:
    tables = np.arange(len(new) * width, dtype=np.int32).reshape(len(new), width) + 100
    queries, contexts = np.array(new, np.int32), np.array(context, np.int32)
    samples = np.array([index != 1 for index in range(len(new))])
    return inputs.fill(np.arange(sum(new), dtype=np.int32), queries, contexts, tables, samples, padding)


def test_every_token_has_its_place() -> None:
    at = fill(step_inputs(), [1, 3, 10], [5, 0, 2], width=3)
    assert at.positions.tolist() == [5, 0, 1, 2, *range(2, 12)]
    assert at.token_entries.tolist() == [101, 103, 103, 103, 106, 106, *[107] * 4, *[108] * 4]
    assert at.token_rows.tolist() == [1, 0, 1, 2, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]
    assert at.query_starts.tolist() == [0, 1, 4]
    assert at.logit_rows.tolist() == [0, 13]  # the second sequence does not sample
    starts = at.table_starts.tolist()
    used = [at.tables[start : start + number].tolist() for start, number in zip(starts, [2, 1, 3], strict=True)]
    assert used == [[100, 101], [103], [106, 107, 108]]


def test_decodes_are_read_in_items_and_prompts_in_tiles_the_longest_first() -> None:
    width = -(-(2 * CHUNK_TOKENS + 1) // BLOCK_TOKENS)
    at = fill(step_inputs(), [1, 10, 1, 12], [2 * CHUNK_TOKENS, 0, 3, 40], width)
    assert at.first_items.tolist() == [0, 3, 3, 4, 4]
    assert at.item_sequences.tolist() == [0, 0, 0, 2] and at.item_chunks.tolist() == [0, 1, 2, 0]
    assert at.has_long_decodes
    assert at.tile_sequences.tolist() == [3, 3, 1, 1] and at.tile_firsts.tolist() == [8, 0, 8, 0]


def test_what_is_padded_does_nothing() -> None:
    padding = Padding(num_tokens=32, num_sequences=8, num_items=8, num_tiles=4, has_long_decodes=False)
    plain, padded = (fill(step_inputs(), [1, 3, 10], [5, 0, 2], 3, shown) for shown in (None, padding))
    assert padded.token_rows[14:].tolist() == [-1] * 18
    assert padded.item_sequences.tolist() == [0, *[-1] * 7]
    assert padded.tile_sequences.tolist() == [2, 2, 1, -1]
    assert padded.first_items.tolist() == [0, *[1] * 8]
    assert padded.logit_rows.tolist() == [0, 13, *[0] * 6]
    for name in ("token_ids", "positions", "token_entries", "query_starts", "context_lengths", "item_chunks"):
        used = getattr(plain, name)
        assert torch.equal(getattr(padded, name)[: len(used)], used), name


def test_addresses_stay_until_the_buffer_must_grow() -> None:
    inputs = step_inputs()
    first, second = (fill(inputs, [1, 2], [context, 1], 8).tables.data_ptr() for context in (3, 20))
    assert first == second and inputs.generation == 0
    at = fill(inputs, [1, 2], [3000, 1], 800)
    assert inputs.generation == 1 and at.tables[: 751 + 1].tolist() == [*range(100, 851), 900]


def test_a_chunk_is_whole_tiles_of_keys() -> None:
    """What a row sums must not depend on its batch: chunks begin where a tile of keys does, whatever its size."""
    assert device_inputs.CHUNK_TOKENS % 64 == 0
