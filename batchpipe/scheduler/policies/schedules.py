"""The schedules that a job can name, each with its policy."""

from __future__ import annotations

from collections.abc import Callable

from batchpipe.scheduler.policies.base import Policy
from batchpipe.scheduler.policies.chunked_prefill import ChunkedPrefill
from batchpipe.scheduler.policies.pipemax import PipeMax
from batchpipe.scheduler.policies.prefill_first import PrefillFirst
from batchpipe.scheduler.policies.td_pipe import TdPipe
from batchpipe.scheduler.policies.temporal import Temporal

SCHEDULES: dict[str, Callable[[], Policy]] = {
    "hybrid": ChunkedPrefill,
    "separate": PrefillFirst,
    "temporal": Temporal,
    "temporal-published": TdPipe,
    "pipemax-published": PipeMax,
}
