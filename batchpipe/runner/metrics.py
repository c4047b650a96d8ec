"""The run's own account: its times, and from them and the engine its row in the metrics."""

from __future__ import annotations

import platform
import uuid
from datetime import UTC, datetime
from importlib.metadata import version
from time import perf_counter
from typing import TYPE_CHECKING

import batchpipe
from batchpipe.report.metrics import RunMetrics
from batchpipe.report.timeline import Sample
from batchpipe.write.row_set import RowCounts

if TYPE_CHECKING:
    from batchpipe.runner.engine import Engine
    from batchpipe.runner.prepare import Prepared

_REPORTED_VERSIONS = ("torch", "transformers", "pyarrow")


class Account:
    """Build it when the run begins; call `loaded` when the engine is ready for its first step."""

    def __init__(self) -> None:
        self._started_at = datetime.now(UTC)
        self._started_seconds = perf_counter()
        self._loaded_seconds = self._started_seconds

    def loaded(self) -> float:
        """The seconds since the run began."""
        self._loaded_seconds = perf_counter()
        return self._loaded_seconds - self._started_seconds

    def metrics(
        self, prepared: Prepared, engine: Engine, counts: RowCounts, timeline: tuple[Sample, ...]
    ) -> RunMetrics:
        now_seconds = perf_counter()
        generate_seconds = now_seconds - self._loaded_seconds
        schedulers = [replica.scheduler for replica in engine.replicas]
        versions = {"batchpipe": batchpipe.__version__, "python": platform.python_version()}
        return RunMetrics(
            run_id=uuid.uuid4().hex,
            job_name=prepared.job.name,
            identity_sha256=prepared.identity.sha256,
            model=prepared.model.name,
            revision=prepared.model.revision,
            versions=versions | {name: version(name) for name in _REPORTED_VERSIONS},
            device_names=engine.device_names,
            started_at=self._started_at,
            ended_at=datetime.now(UTC),
            load_seconds=self._loaded_seconds - self._started_seconds,
            generate_seconds=generate_seconds,
            wall_seconds=now_seconds - self._started_seconds,
            rows_total=counts.total,
            rows_succeeded=counts.succeeded,
            rows_failed=counts.failed,
            rows_canceled=counts.canceled,
            **engine.meter.measured(generate_seconds),
            phase_switches=sum(scheduler.num_phase_switches for scheduler in schedulers),
            preemptions=sum(scheduler.num_preemptions for scheduler in schedulers),
            recomputed_tokens=sum(scheduler.num_recomputed_tokens for scheduler in schedulers),
            reused_tokens=sum(scheduler.num_reused_tokens for scheduler in schedulers),
            peak_device_blocks=sum(scheduler.peak_device_blocks for scheduler in schedulers),
            peak_host_blocks=sum(scheduler.peak_host_blocks for scheduler in schedulers),
            kv_faults=sum(scheduler.num_corrupt for scheduler in schedulers),
            planner_seconds=sum(replica.planner_seconds for replica in engine.replicas),
            timeline=timeline,
        )
