"""One stage's two tiers on a virtual clock: its computing, and a copy engine in each direction of its link.

Steps come in order, each with what it moves (`types.Transfers`). A step computes once its loads have arrived and one of
the two staging buffers for new KV is free, and each layer once its staged blocks have arrived.

- Loads begin once the step is submitted and the step before the previous one is computed.
- The first two layers of staged blocks begin like loads, each further layer once the layer two before it is computed.
- New KV goes to the host after the step.
- If nothing computes any more when a step is submitted, its loads come layer by layer, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from batchpipe.types import Int32Array, LinkUse, Step

if TYPE_CHECKING:
    from batchpipe.cost.model import KvLink


@dataclass(frozen=True, slots=True)
class Moved:
    """Host blocks that a step loads [L], stages [V] and writes [W], the same on every stage, and its new tokens."""

    loads: Int32Array
    staged: Int32Array
    written: Int32Array
    num_new_tokens: int

    @classmethod
    def of(cls, step: Step, block_tokens: int) -> Moved:
        transfers = step.transfers
        assert transfers is not None, "a step without transfers where there are two tiers"
        columns = np.arange(transfers.host_tables.shape[1])
        first = step.context_lengths // block_tokens
        last = (step.context_lengths + step.query_lengths - 1) // block_tokens
        is_written = (first[:, None] <= columns) & (columns <= last[:, None])
        written = np.concatenate([transfers.host_tables[is_written], transfers.host_copies[:, 1]])
        return cls(transfers.loads[:, 0], transfers.staged_blocks, written, int(step.query_lengths.sum()))


class LinkClock:
    """One stage's link and computing. Times are seconds of the virtual clock."""

    def __init__(self, link: KvLink, block_tokens: int, num_host_blocks: int) -> None:
        self._link = link
        self._block_bytes = link.block_bytes(block_tokens)
        self._loads = CopyEngineClock()
        self._computed = (0.0, 0.0)  # ends of the last two steps, the earlier one first
        self._stored = (0.0, 0.0)
        self._on_host = np.zeros(num_host_blocks)  # by host block, when its latest rows are there

    def run(
        self, moved: Moved, submitted: float, due: float, work_seconds: float, link_share: float = 1.0
    ) -> tuple[float, LinkUse]:
        """The end of a step's computing, which could start at `due` if no KV had to be waited for, and its link use.

        link_share: the part of its rate that the link carries.
        """
        load_rate = link_share * self._link.load_bytes_per_second
        loads, staged = (len(blocks) * self._block_bytes for blocks in (moved.loads, moved.staged))
        sources = np.concatenate([moved.loads, moved.staged])
        opens = max(submitted, self._computed[0], self._on_host[sources].max(initial=0.0))
        start = max(due, self._stored[0])
        by_layer = loads if submitted >= self._computed[1] else 0
        if loads > by_layer:
            start = max(start, self._loads.carry(opens, loads / load_rate))
        waited = self._wait_by_layer(opens, start, work_seconds, staged / load_rate, by_layer / load_rate)
        end = start + work_seconds + waited
        stored_bytes = moved.num_new_tokens * self._link.kv_bytes_per_token
        store_seconds = stored_bytes / (link_share * self._link.store_bytes_per_second)
        self._stored = (self._stored[1], max(self._stored[1], end) + store_seconds)
        self._on_host[moved.written] = self._stored[1]
        self._loads.forget(self._computed[1])
        self._computed = (self._computed[1], end)
        use = LinkUse(
            stall_seconds=start - due + waited,
            loaded_bytes=loads + staged,
            stored_bytes=stored_bytes,
            load_seconds=(loads + staged) / load_rate,
            store_seconds=store_seconds,
        )
        return end, use

    def _wait_by_layer(
        self, opens: float, start: float, work_seconds: float, staged_seconds: float, load_seconds: float
    ) -> float:
        """Seconds that computing waits, layer by layer, for the layer's part of staged blocks and loads."""
        num_layers = self._link.num_layers
        waited = 0.0
        two_before, before = opens, opens  # when the layers' slots are free
        for layer in range(num_layers if staged_seconds or load_seconds else 0):
            arrived = opens
            if staged_seconds:
                arrived = self._loads.carry(two_before, staged_seconds / num_layers)
            if load_seconds:
                arrived = max(arrived, self._loads.carry(opens, load_seconds / num_layers))
            waited = max(waited, arrived - start - work_seconds * layer / num_layers)
            two_before, before = before, start + waited + work_seconds * (layer + 1) / num_layers
        return waited


class CopyEngineClock:
    """One direction of a link: transfers run in the order in which they are announced, later ones fill the gaps."""

    def __init__(self) -> None:
        self._taken: list[tuple[float, float]] = []  # from, until; in order, apart

    def carry(self, opens: float, seconds: float) -> float:
        """The end of a transfer that may begin at `opens` and keeps the engine for `seconds`."""
        before = [taken for taken in self._taken if taken[1] <= opens]
        after = self._taken[len(before) :]
        begin, end = opens, opens + seconds
        while after and after[0][0] < end:
            taken_from, taken_until = after.pop(0)
            begin = min(begin, taken_from)
            end += taken_until - max(taken_from, opens)
        self._taken = [*before, (begin, end), *after]
        return end

    def forget(self, until: float) -> None:
        """No later transfer opens before `until`."""
        self._taken = [taken for taken in self._taken if taken[1] > until]
