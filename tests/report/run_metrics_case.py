"""The metrics of a run of ten rows."""

from datetime import UTC, datetime

from batchpipe.report.metrics import RunMetrics

RUN_METRICS = RunMetrics(
    run_id="run-1",
    job_name="quickstart",
    identity_sha256="ab" * 32,
    model="tiny",
    revision=None,
    versions={"batchpipe": "0.1.0", "torch": "2.13.0"},
    device_names=("cpu",),
    started_at=datetime(2025, 1, 1, tzinfo=UTC),
    ended_at=datetime(2025, 1, 1, 0, 1, tzinfo=UTC),
    load_seconds=1.0,
    generate_seconds=50.0,
    wall_seconds=60.0,
    rows_total=10,
    rows_succeeded=8,
    rows_failed=2,
    rows_canceled=0,
    prompt_tokens=100,
    completion_tokens=200,
    output_tokens_per_second=4.0,
    total_tokens_per_second=6.0,
    num_stages=2,
    num_replicas=1,
    stage_utilization=(0.5, 0.75),
    phase_switches=1,
    preemptions=0,
    recomputed_tokens=0,
    reused_tokens=0,
    peak_device_blocks=12,
    peak_host_blocks=0,
    host_to_device_bytes=0,
    device_to_host_bytes=0,
    stall_seconds=0.0,
    kv_faults=0,
    predictor_mean_absolute_error_tokens=None,
    predictor_sum_error=None,
    planner_seconds=0.1,
)
