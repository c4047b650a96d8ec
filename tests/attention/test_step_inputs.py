from __future__ import annotations

import numpy as np
import torch

from batchpipe.attention.base import AttentionInputs
from batchpipe.attention.reference import ReferenceAttention
from batchpipe.attention.step_inputs import StepInputs
from batchpipe.kv.pool import KvPool

BLOCK_TOKENS = 4


def fill(
    step_inputs: StepInputs, queries: list[int], contexts: list[int], width: int, **options: object
) -> AttentionInputs:
    return step_inputs.fill(
        np.array(queries, np.int32),
        np.array(contexts, np.int32),
        np.arange(len(queries) * width, dtype=np.int32).reshape(len(queries), width),
        backend=ReferenceAttention(),
        **options,  # type: ignore[arg-type]
    )


def addresses(inputs: AttentionInputs) -> list[int]:
    tensors = (inputs.query_lengths, inputs.context_lengths, inputs.query_starts, inputs.block_tables, inputs.positions)
    return [tensor.data_ptr() for tensor in tensors]


def test_steps_of_any_shape_are_read_at_the_same_addresses() -> None:
    step_inputs = StepInputs(KvPool(9, 1, 1, BLOCK_TOKENS, 16, torch.float32), max_step_tokens=8)
    first = fill(step_inputs, [3, 1, 2], [2, 8, 0], width=3)
    places = addresses(first), step_inputs.device_token_ids(np.arange(6, dtype=np.int32)).data_ptr()
    second = fill(step_inputs, [1, 4], [7, 1], width=2)
    assert (addresses(second), step_inputs.device_token_ids(np.arange(5, dtype=np.int32)).data_ptr()) == places
    assert second.query_lengths.tolist() == [1, 4] and second.context_lengths.tolist() == [7, 1]
    assert second.query_starts.tolist() == [0, 1, 5] and second.block_tables.tolist() == [[0, 1], [2, 3]]
    assert step_inputs.device_positions(second).tolist() == [7, 1, 2, 3, 4]
    assert second.num_tokens == 5
    assert step_inputs.device_logit_rows(second, np.array([False, True])).tolist() == [4]


def test_buffers_grow_with_the_step() -> None:
    step_inputs = StepInputs(KvPool(9, 1, 1, BLOCK_TOKENS, 16, torch.float32))
    for width in (1, 2, 9, 30):
        inputs = fill(step_inputs, [width] * width, [0] * width, width)
        assert inputs.positions.tolist() == list(range(width)) * width
        assert inputs.block_tables.tolist() == np.arange(width * width).reshape(width, width).tolist()
        tokens = np.arange(width * width, dtype=np.int32)
        assert step_inputs.device_token_ids(tokens).tolist() == tokens.tolist()


def test_a_staged_block_is_read_in_two_slots_by_turns() -> None:
    pool = KvPool(9, 6, 1, BLOCK_TOKENS, 16, torch.float32)
    inputs = fill(StepInputs(pool), [1], [7], width=2, staging_slots=np.array([[-1, 50]], np.int32))
    assert [inputs.blocks_of(layer)[1].tolist() for layer in (0, 1, 2, 5)] == [
        [[0, 50]],
        [[1, 51]],
        [[2, 50]],
        [[5, 51]],
    ]
    assert inputs.blocks_of(1)[0].shape == (54, 2, 1, BLOCK_TOKENS, 16)
