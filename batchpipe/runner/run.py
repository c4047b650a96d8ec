"""From rows to committed completions: read, render, tokenise, plan, run, detokenise, write."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial

from batchpipe.cost.online import OnlineCost
from batchpipe.errors import InterruptedRunError, TooManyFailedError
from batchpipe.pipeline.base import Pipeline
from batchpipe.placement.placement import Placement
from batchpipe.read.ahead import Ahead
from batchpipe.report.lines import say
from batchpipe.report.metrics import append_metrics
from batchpipe.report.note import NoteWriter
from batchpipe.report.progress import Progress, Reading
from batchpipe.report.timeline import Sample, Timeline
from batchpipe.report.trace import StepTrace
from batchpipe.runner.engine import Engine
from batchpipe.runner.gc_tuning import calm_collector
from batchpipe.runner.interrupt import Interrupt
from batchpipe.runner.metrics import Account
from batchpipe.runner.prepare import Prepared
from batchpipe.runner.result import Result, exit_code
from batchpipe.runner.told import end_lines, loaded_line, start_line
from batchpipe.sample.detokenize import detokenize, failed_outcome
from batchpipe.types import FailedRow, Request
from batchpipe.write.folder import OutputFolder
from batchpipe.write.row_set import RowCounts
from batchpipe.write.writer import CompletionWriter

logger = logging.getLogger(__name__)

OpenPipelines = Callable[[Placement], Sequence[Pipeline]]

# Rows read and tokenised before the engine asks for them; a few tens of megabytes with long prompts.
AHEAD_ROWS = 4096
# Blocks beyond what all rows can fill at a time, so that no policy sees memory run short and holds rows back.
SPARE_KV = 2.0
# How long loading waits for the rows of a small input, to make no more KV than they can use.
READ_SECONDS = 0.5


def open_placed(placement: Placement) -> Sequence[Pipeline]:
    from batchpipe.placement.open import open_pipelines  # brings torch and transformers' models

    return open_pipelines(placement)


def run_rows(prepared: Prepared, folder: OutputFolder, account: Account, open_pipelines: OpenPipelines) -> Result:
    """Runs the rows that `folder` lacks. Raises StoppedRunError if it ends before the last of them."""
    with ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt())
        ahead = stack.enter_context(Ahead(prepared.requests(skip=folder.done), AHEAD_ROWS))
        predictor = prepared.open_predictor()
        placement = prepared.place(partial(_blocks_of_all, ahead))
        if placement.engine.kv_host_memory > 0 and placement.offload.mode == "none":
            reason = placement.offload.reason
            logger.warning("KV stays on the device, engine.kv_host_memory is not used: %s", reason)
        say(start_line(prepared, placement, folder))
        pipelines = open_pipelines(placement)
        cost = None if placement.cost is None else OnlineCost(placement.cost.model)
        for pipeline in pipelines:
            stack.enter_context(pipeline)
        stack.enter_context(calm_collector())
        say(loaded_line(account.loaded(), pipelines[0].capacity, len(pipelines)))
        writer = stack.enter_context(CompletionWriter(folder, prepared.job.output.part_rows))
        trace = None
        if prepared.job.run.trace:
            trace = stack.enter_context(StepTrace(folder.place, len(pipelines), pipelines[0].capacity.num_stages))
        engine = Engine(
            pipelines, prepared.schedule, prepared.eos_token_ids, prepared.matcher_of, predictor, cost, trace
        )
        reading = partial(_reading, prepared, engine, writer)
        note = stack.enter_context(NoteWriter(folder.state, partial(_rows_total, prepared), reading))
        progress = stack.enter_context(Progress(prepared.source.num_rows(), reading))
        timeline, sample = Timeline(), partial(_sample, engine, writer)
        stop: str | None = None
        while stop is None and not (engine.idle and ahead.exhausted):
            items = ahead.take(engine.room, block=engine.idle)
            engine.add(item for item in items if isinstance(item, Request))
            outcomes = [failed_outcome(item) for item in items if isinstance(item, FailedRow)]
            outcomes += detokenize(engine.advance(), prepared.texts, prepared.eos_token_ids, prepared.reasoning)
            engine.meter.add_outcomes(outcomes)
            writer.write(outcomes)
            progress.tick()
            note.tick()
            timeline.tick(sample)
            stop = interrupt.requested or _too_many_failed(prepared, writer.counts)
        metrics = account.metrics(prepared, engine, writer.counts, timeline.ended(sample))
        append_metrics(folder.place, metrics)
        if stop is None:
            writer.finish(prepared.source.rows_seen)
    for line in end_lines(folder.counts, is_complete=stop is None):
        say(line)
    result = Result(folder.place, asdict(metrics), exit_code(folder.counts))
    if interrupt.requested is not None and stop is not None:
        rows_total, is_estimate = _rows_total(prepared)
        of_total = f"{metrics.rows_total:,} of {'about ' if is_estimate else ''}{rows_total:,} rows done"
        message = f"stopped by {stop} with {of_total}; the same command continues"
        raise InterruptedRunError(message, result.summary)
    if stop is not None:
        raise TooManyFailedError(stop, result.summary)
    return result


def _blocks_of_all(ahead: Ahead[Request | FailedRow], block_tokens: int) -> int | None:
    """KV blocks of all rows at a time, if they are few enough to have been read already; for `Placement.job_blocks`."""
    items = ahead.whole(READ_SECONDS)
    if items is None:
        return None
    blocks = sum(
        item.sampling.n * -(-(len(item.prompt_token_ids) + item.sampling.max_tokens) // block_tokens)
        for item in items
        if isinstance(item, Request)
    )
    return int(SPARE_KV * blocks) + 1


def _reading(prepared: Prepared, engine: Engine, writer: CompletionWriter) -> Reading:
    """For the progress line. A row that runs is done in part."""
    counts = writer.counts
    fraction = (counts.total + engine.rows_under_way) / max(prepared.estimated_rows(), 1.0)
    tokens = engine.meter.prompt_tokens, engine.meter.output_tokens
    return Reading(counts.total, counts.failed, *tokens, min(fraction, 1.0))


def _sample(engine: Engine, writer: CompletionWriter, seconds: float) -> Sample:
    schedulers = [replica.scheduler for replica in engine.replicas]
    return Sample(
        seconds=seconds,
        rows=writer.counts.total,
        prompt_tokens=engine.meter.prompt_tokens,
        output_tokens=engine.meter.output_tokens,
        running=sum(scheduler.num_running for scheduler in schedulers),
        waiting=engine.num_waiting,
        device_blocks=sum(scheduler.num_device_blocks for scheduler in schedulers),
        host_blocks=sum(scheduler.num_host_blocks for scheduler in schedulers),
        busy_seconds=engine.meter.busy_seconds,
    )


def _rows_total(prepared: Prepared) -> tuple[int, bool]:
    """Rows of the input, and whether they are estimated."""
    is_estimate = prepared.source.num_rows() is None and prepared.source.progress < 1
    return round(prepared.estimated_rows()), is_estimate


def _too_many_failed(prepared: Prepared, counts: RowCounts) -> str | None:
    allowed = prepared.job.output.max_failed_fraction
    if allowed == 1 or counts.failed <= allowed * prepared.estimated_rows():
        return None
    return (
        f"{counts.failed} of about {prepared.estimated_rows():.0f} rows failed, more than "
        f"output.max_failed_fraction = {allowed} allows; the column error_message says why"
    )
