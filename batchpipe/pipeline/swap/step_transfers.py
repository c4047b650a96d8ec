"""One step on its way through one stage's two tiers of KV: what it moves, and the moments others wait for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from batchpipe.kv.pool import KvPool
from batchpipe.pipeline.swap.copy_engine import Link, TransferEvent
from batchpipe.types import Int32Array, Step, Transfers


@dataclass(slots=True, kw_only=True)
class StepTransfers:
    """The `number`-th step. L layers, V streamed blocks, T new tokens."""

    number: int
    step: Step
    transfers: Transfers
    stream_units: Int32Array  # [V]: the device block of each streamed block
    stream_slots: Int32Array  # [V]: the layer slot that its even layers pass through
    loads_by_layer: bool  # nothing computes beside the step's loads, so they come beside its own layers
    host_blocks: Int32Array  # [T]: where each new token's KV goes
    host_rows: Int32Array  # [T]
    loaded_bytes: int  # and streamed
    stored_bytes: int
    loaded: list[TransferEvent]  # of loads by layer [L]: a layer of them is on the device
    arrived: list[TransferEvent]  # [L], [0] where V is 0: a layer of the streams is on the device
    attended: list[TransferEvent]  # as long: it may be overwritten
    computed: TransferEvent
    stored: TransferEvent
    checks: Tensor | None = None  # int64, of those new tokens that are looked at

    @classmethod
    def of(
        cls, step: Step, number: int, pool: KvPool, streams_per_block: int, link: Link, *, is_alone: bool
    ) -> StepTransfers:
        transfers = step.transfers
        assert transfers is not None, "a step without transfers where there are two tiers"
        num_streams = len(transfers.streams)
        assert num_streams <= len(transfers.stream_units) * streams_per_block, "more streams than units for them"
        unit_indices, pairs = np.divmod(np.arange(num_streams, dtype=np.int32), np.int32(max(1, streams_per_block)))
        units = transfers.stream_units[unit_indices]
        sequences = np.repeat(np.arange(len(step.query_lengths)), step.query_lengths)
        first_rows = np.cumsum(step.query_lengths) - step.query_lengths
        positions = np.arange(len(sequences)) + (step.context_lengths - first_rows)[sequences]
        # What the step copies before its first layer must be there whole.
        is_copied = np.isin(transfers.loads[:, 1], step.copied_blocks[:, 0])
        layers_that_wait = range(pool.num_layers if num_streams else 0)
        return cls(
            number=number,
            step=step,
            transfers=transfers,
            stream_units=units,
            stream_slots=units * pool.num_layers + 2 * pairs,
            loads_by_layer=is_alone and len(is_copied) > 0 and not is_copied.any(),
            host_blocks=transfers.host_tables[sequences, positions // pool.block_tokens],
            host_rows=(positions % pool.block_tokens).astype(np.int32),
            loaded_bytes=(len(transfers.loads) + num_streams) * pool.bytes_per_block,
            stored_bytes=len(positions) * pool.bytes_per_block // pool.block_tokens,
            loaded=[],
            arrived=[link.mark() for _ in layers_that_wait],
            attended=[link.mark() for _ in layers_that_wait],
            computed=link.mark(),
            stored=link.mark(),
        )
