"""How much KV the batches in flight may hold when part of it comes from host memory for every step.

Derived from PipeMax's sliding window (arXiv 2605.02189): a step can bring Q blocks to the device while it, or the step
before it, computes. A batch of K blocks then keeps K - Q of them on the device between its turns.
"""

from __future__ import annotations

# Loads that stand on the device beside what stays there, in steps, where a batch's loads come whole: those of the step
# that runs, and those of the next one.
BATCH_BUFFERS = 2.0


def batch_capacity_blocks(device_blocks: float, budget_blocks: float, num_batches: int, num_buffers: float) -> float:
    """K, the blocks of each of C batches where each step loads Q blocks: (M + (C - B) Q) / C, and M / B at most.

    device_blocks: M. budget_blocks: Q. num_buffers: B, how much of a step's loads the device holds beside what stays
    there: `BATCH_BUFFERS`, or 1 / G where the loads come in G groups of layers while the step itself runs.
    """
    capacity = (device_blocks + (num_batches - num_buffers) * budget_blocks) / num_batches
    return min(capacity, device_blocks / num_buffers)
