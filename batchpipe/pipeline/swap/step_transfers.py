"""One step's passage through one stage's two tiers of KV: what it moves, and the events that order the moves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from batchpipe.kv.pool import KvPool
from batchpipe.pipeline.swap.copy_engine import Link, TransferEvent
from batchpipe.types import Int32Array, Step, Transfers


@dataclass(slots=True, kw_only=True)
class StepTransfers:
    """The step that is the `number`-th on this stage. L layers, V staged blocks, T new tokens."""

    number: int
    step: Step
    transfers: Transfers
    staging_blocks: Int32Array  # [V]: the device block of each staging slot
    staging_slots: Int32Array  # [V]: the layer slot where it begins, see `AttentionInputs`
    loads_by_layer: bool  # nothing computes beside the step's loads, so they are copied beside its own layers
    host_blocks: Int32Array  # [T]: where each new token's KV goes
    device_blocks: Int32Array  # [T]: where it is computed; any block's number where that one is staged
    host_rows: Int32Array  # [T]
    loaded_bytes: int  # staged blocks included
    stored_bytes: int
    loaded: list[TransferEvent]  # a piece of the loads is on the device; [L] if loads are by layer
    arrived: list[TransferEvent]  # [L], none if V is 0: a layer of the staged blocks is on the device
    attended: list[TransferEvent]  # one for each of `arrived`: the layer is computed, its slots may be overwritten
    computed: TransferEvent
    stored: TransferEvent
    checks: Tensor | None = None  # int64, checksums of the new tokens that are verified

    @classmethod
    def of(
        cls, step: Step, number: int, pool: KvPool, streams_per_block: int, link: Link, *, is_alone: bool
    ) -> StepTransfers:
        """is_alone: no step is computed beside this one's transfers."""
        transfers = step.transfers
        assert transfers is not None, "a step without transfers where there are two tiers"
        num_staged = len(transfers.staged_blocks)
        assert num_staged <= len(transfers.staging_blocks) * streams_per_block, "more staged blocks than slots for them"
        indices, pairs = np.divmod(np.arange(num_staged, dtype=np.int32), np.int32(max(1, streams_per_block)))
        staging_blocks = transfers.staging_blocks[indices]
        sequences = np.repeat(np.arange(len(step.query_lengths)), step.query_lengths)
        first_rows = np.cumsum(step.query_lengths) - step.query_lengths
        positions = np.arange(len(sequences)) + (step.context_lengths - first_rows)[sequences]
        # A block that the step copies before its first layer must be there as a whole.
        is_copied = np.isin(transfers.loads[:, 1], step.copied_blocks[:, 0])
        staged_layers = range(pool.num_layers if num_staged else 0)
        return cls(
            number=number,
            step=step,
            transfers=transfers,
            staging_blocks=staging_blocks,
            staging_slots=staging_blocks * pool.num_layers + 2 * pairs,
            # Waiting in every layer costs a GPU more than it hides: such a step cannot run as a graph.
            loads_by_layer=(
                is_alone and pool.device.type == "cpu" and len(is_copied) > 0 and not bool(is_copied.any())
            ),
            host_blocks=transfers.host_tables[sequences, positions // pool.block_tokens],
            device_blocks=step.block_tables[sequences, positions // pool.block_tokens],
            host_rows=(positions % pool.block_tokens).astype(np.int32),
            loaded_bytes=(len(transfers.loads) + num_staged) * pool.bytes_per_block,
            stored_bytes=len(positions) * pool.bytes_per_block // pool.block_tokens,
            loaded=[],
            arrived=[link.new_event() for _ in staged_layers],
            attended=[link.new_event() for _ in staged_layers],
            computed=link.new_event(),
            stored=link.new_event(),
        )
