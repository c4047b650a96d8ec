"""Whether a run's KV uses host memory, and how it comes back from there: one decision, made before the model loads.

Where the link's rate and a step's time are known, the law of `batch_capacity_blocks` says how much KV may be in use:
C batches of K blocks each. Batch by batch needs one batch more than stages, since the loads of a step run beside the
step before it and so have to be known by then; layer by layer needs none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from batchpipe.kv.layout import saves_room
from batchpipe.scheduler.offload.selection import BATCH_BUFFERS, batch_capacity_blocks

OffloadMode = Literal["none", "batch", "layer", "both"]


@dataclass(frozen=True, slots=True)
class OffloadChoice:
    """reason: a clause for people, with the numbers that decided."""

    mode: OffloadMode
    reason: str


def choose_offload(
    asked: str,
    *,
    num_stages: int,
    device_blocks: int,
    host_blocks: int,
    needed_blocks: float | None,
    step_seconds: float | None,
    link_bytes_per_second: float | None,
    block_bytes: int,
    streams_per_block: int,
) -> OffloadChoice:
    """What `engine.offload` comes to. Blocks are the same number on every stage.

    needed_blocks: of all sequences that may run at a time. step_seconds: of a step on one stage.
    link_bytes_per_second, block_bytes: of the stage whose link carries the fewest blocks a second.
    None: not known; the choice goes by the number of stages then.
    streams_per_block: as in `Capacity`.
    """
    if host_blocks == 0:
        return OffloadChoice("none", "engine.kv_host_memory is 0")
    if asked in ("none", "batch", "layer"):
        assert asked != "layer" or saves_room(streams_per_block), "too few layers to stream"
        mode: OffloadMode = asked  # type: ignore[assignment]
        return OffloadChoice(mode, f"engine.offload is {asked}")
    assert asked == "auto"
    if host_blocks <= device_blocks:
        return OffloadChoice(
            "none",
            f"engine.kv_host_memory holds {host_blocks} blocks and the device {device_blocks}: the host keeps a copy "
            "of all KV, so only what it holds beyond the device would let more sequences run",
        )
    if needed_blocks is not None and needed_blocks <= device_blocks:
        return OffloadChoice("none", f"the device's {device_blocks} blocks hold all that can run at a time")
    if not saves_room(streams_per_block):
        return OffloadChoice("batch", "a stage of fewer than four layers has too few to stream them")
    if num_stages == 1:
        return OffloadChoice("layer", "one stage: no other batch computes while KV comes, but other layers do")
    if step_seconds is None or link_bytes_per_second is None:
        return OffloadChoice("batch", f"{num_stages} stages; the link's rate is not known")
    return _of_law(
        num_stages,
        device_blocks,
        host_blocks if needed_blocks is None else min(host_blocks, needed_blocks),
        budget_blocks=int(step_seconds * link_bytes_per_second / block_bytes),
        streams_per_block=streams_per_block,
    )


def _of_law(
    num_stages: int, device_blocks: int, useful_blocks: float, *, budget_blocks: int, streams_per_block: int
) -> OffloadChoice:
    """Of a pipeline: batch by batch if that carries what is useful, else layers besides."""
    num_batches = num_stages + 1

    def running_blocks(num_buffers: float) -> float:
        return num_batches * float(batch_capacity_blocks(device_blocks, budget_blocks, num_batches, num_buffers))

    by_batch, by_both = running_blocks(BATCH_BUFFERS), running_blocks(1 / streams_per_block)
    carried = f"the link carries {budget_blocks} blocks in a step"
    if by_both <= device_blocks:
        return OffloadChoice("none", f"{carried}: no more can run than the device's {device_blocks} blocks hold")
    if by_batch >= useful_blocks or by_batch >= by_both:
        return OffloadChoice("batch", f"{carried}, so batches may have {by_batch:.0f} of {useful_blocks:.0f} blocks")
    return OffloadChoice(
        "both", f"{carried}: batches may have {by_batch:.0f} blocks, and {by_both:.0f} if layers come beside the step"
    )
