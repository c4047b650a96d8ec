"""Whether a run's KV uses host memory, and how it comes back from there: one decision, made before the model loads.

Where the link's rate and a step's time are known, the capacity law (`kv.capacity_law`) says how much KV may be in use:
C batches of K blocks each. Loads of whole batches need one batch more than stages, since those of a step run beside the
step before it and so have to be known by then; layer by layer needs none, and less room on the device, so it keeps more
KV in use with every link. Whole batches are for stages with too few layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from batchpipe.kv.capacity_law import BATCH_BUFFERS, batch_capacity_blocks
from batchpipe.kv.layout import saves_room

OffloadMode = Literal["none", "batch", "layer"]


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
    on_gpu: bool = False,
) -> OffloadChoice:
    """What `engine.offload` comes to. Blocks are the same number on every stage.

    needed_blocks: of all sequences that may run at a time. step_seconds: of a step on one stage.
    link_bytes_per_second, block_bytes: of the stage whose link carries the fewest blocks a second.
    None: not known; host memory is used then, but on one GPU, where nothing hides what the link takes too long for.
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
    layerwise = saves_room(streams_per_block)
    mode = "layer" if layerwise else "batch"
    how = "layer by layer beside a step" if layerwise else "a stage of fewer than four layers has too few to stream"
    if num_stages == 1 and on_gpu and (step_seconds is None or link_bytes_per_second is None):
        return OffloadChoice(
            "none", "how long a step takes here is not known, so not what the link carries beside it; "
            "`batchpipe profile` measures both",
        )  # fmt: skip
    if num_stages == 1 or step_seconds is None or link_bytes_per_second is None:
        return OffloadChoice(mode, how)
    # Of a pipeline nothing but the link decides whether more can run than the device holds.
    num_batches = num_stages + (not layerwise)
    budget_blocks = int(step_seconds * link_bytes_per_second / block_bytes)
    num_buffers = 1 / streams_per_block if layerwise else BATCH_BUFFERS
    running_blocks = int(num_batches * batch_capacity_blocks(device_blocks, budget_blocks, num_batches, num_buffers))
    carried = f"the link carries {budget_blocks} blocks in a step"
    if running_blocks <= device_blocks:
        return OffloadChoice("none", f"{carried}: no more can run than the device's {device_blocks} blocks hold")
    useful_blocks = host_blocks if needed_blocks is None else min(host_blocks, needed_blocks)
    carried += f", so batches may have {min(running_blocks, useful_blocks):.0f} of {useful_blocks:.0f} useful blocks"
    return OffloadChoice(mode, f"{how}; {carried}")
