"""The model runner of a GPU: nothing of a step is looked at on the host, and small steps run as graphs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from batchpipe.attention.base import AttentionBackend, AttentionInputs
from batchpipe.attention.device_inputs import CHUNK_TOKENS, DeviceInputs, DeviceStepInputs, Padding
from batchpipe.kv.pool import KvPool
from batchpipe.pipeline.model_runner.base import StagePart
from batchpipe.pipeline.model_runner.graphs import StepGraphs, most_padded, padding_of
from batchpipe.types import Int32Array, Step


class GpuRunner:
    """See `ModelRunner`. For the Triton backend: nothing of a step is read on the host, and decodes run as graphs."""

    def __init__(self, part: StagePart, pool: KvPool, tile_queries: int) -> None:
        self._part = part
        self._pool = pool
        self._tile_queries = tile_queries
        self._num_padded = most_padded(part.max_step_tokens)
        self._inputs = DeviceStepInputs(
            pool.device,
            pool.block_tokens,
            max_tokens=self._num_padded,
            max_sequences=most_padded(part.max_batch_sequences),
            tile_queries=tile_queries,
        )
        self._graphs = StepGraphs(pool.device) if pool.device.type == "cuda" else None
        self._hidden: Tensor | None = None  # where a graph finds what the stage before computed

    def run(
        self,
        step: Step,
        hidden: Tensor | None,
        backend: AttentionBackend,
        staging_slots: Int32Array | None,
        sampled_before: Tensor | None,
    ) -> Tensor:
        tables = step.block_tables
        if staging_slots is not None:
            tables = np.where(staging_slots >= 0, ~staging_slots, tables)
        # With staged blocks a layer waits for its KV on the host, which no graph can.
        padding = self._padding_of(step) if hasattr(backend, "attend") else None
        inputs = self._inputs.fill(
            step.token_ids, step.query_lengths, step.context_lengths, tables, step.samples, padding
        )
        if padding is None:
            return self._forward(inputs, hidden, backend, sampled_before)
        assert self._graphs is not None
        if hidden is not None:
            hidden = self._at_fixed_address(hidden, padding.num_tokens)
        output = self._graphs.run(
            padding,
            inputs,
            self._inputs.generation,
            lambda inputs: self._forward(inputs, hidden, backend, sampled_before),
        )
        return output[: int(step.samples.sum()) if self._part.is_last else len(step.token_ids)]

    def _padding_of(self, step: Step) -> Padding | None:
        """None: the step is not recorded."""
        if self._graphs is None or not self._graphs.are_usable:
            return None
        lengths = step.query_lengths
        is_decode = lengths == 1
        num_items = -(-(step.context_lengths + 1) // CHUNK_TOKENS)[is_decode]
        num_tiles = int((-(-lengths // self._tile_queries))[~is_decode].sum())
        return padding_of(
            len(step.token_ids),
            len(lengths),
            int(num_items.sum()),
            num_tiles,
            has_long_decodes=bool((num_items > 1).any()),
        )

    def _at_fixed_address(self, hidden: Tensor, num_tokens: int) -> Tensor:
        if self._hidden is None:
            self._hidden = hidden.new_zeros(self._num_padded, hidden.shape[1])
        self._hidden[: len(hidden)].copy_(hidden)
        return self._hidden[:num_tokens]

    def _forward(
        self, at: DeviceInputs, hidden: Tensor | None, backend: AttentionBackend, sampled_before: Tensor | None
    ) -> Tensor:
        inputs = AttentionInputs.of_device(at, self._pool, backend, self._part.first_layer)
        source = _token_ids(at, sampled_before) if hidden is None else hidden
        rows = at.logit_rows.long() if self._part.is_last else None
        return self._part.model.forward(inputs, source, at.positions.long(), rows)


def _token_ids(at: DeviceInputs, sampled_before: Tensor | None) -> Tensor:
    """int64 [T]: the step's tokens, with those that only the device knows yet in their places."""
    token_ids = at.token_ids.long()
    if sampled_before is None:
        return token_ids
    sampled = sampled_before[(~token_ids).clamp_(min=0)].long()
    # A row whose logits were not finite has no token; its sequence fails when the host hears of it.
    return torch.where(token_ids < 0, sampled.clamp_(min=0), token_ids)
