"""All model copies as one thing: requests go in, finished requests come out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from batchpipe.cost.model import CostModel
from batchpipe.pipeline.base import Pipeline
from batchpipe.predict.base import LengthPredictor
from batchpipe.report.meter import Meter
from batchpipe.report.trace import StepTrace
from batchpipe.runner.length_updates import LengthUpdates
from batchpipe.runner.replica import Replica
from batchpipe.scheduler.sequence import StopMatcher
from batchpipe.types import FinishedRequest, Request

# Requests that wait, read and tokenised, for each sequence that may run, so that the replicas never lack requests.
WAITING_PER_RUNNING = 2
# After this long one silent replica is asked for its result; its pipeline names the stage that does not answer.
SILENCE_SECONDS = 60.0


class Engine:
    """Replicas fed from one line of requests. Beside what it runs, each holds up to `max_running` waiting requests."""

    def __init__(
        self,
        pipelines: Sequence[Pipeline],
        schedule: str,
        eos_token_ids: frozenset[int],
        matcher_of: Callable[[Request], StopMatcher | None],
        predictor: LengthPredictor | None = None,
        cost: CostModel | None = None,
        trace: StepTrace | None = None,
    ) -> None:
        assert pipelines
        self.meter = Meter(pipelines[0].capacity.num_stages, len(pipelines))
        self.replicas = [
            Replica(index, pipeline, self.meter, schedule, eos_token_ids, matcher_of, cost, trace)
            for index, pipeline in enumerate(pipelines)
        ]
        self._forecaster = (
            None if predictor is None else LengthUpdates(predictor, [r.scheduler.state for r in self.replicas])
        )
        self._line: deque[Request] = deque()
        self._window = WAITING_PER_RUNNING * sum(replica.max_running for replica in self.replicas)

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._line and all(replica.scheduler.idle for replica in self.replicas)

    @property
    def device_names(self) -> tuple[str, ...]:
        """One name a stage, the first replica's stages first."""
        return tuple(name for replica in self.replicas for name in replica.device_names)

    @property
    def rows_under_way(self) -> float:
        """The finished part of the running rows, in rows, given their expected lengths; 0 without a prediction."""
        return 0.0 if self._forecaster is None else self._forecaster.rows_under_way()

    @property
    def num_waiting(self) -> int:
        return len(self._line) + sum(replica.scheduler.num_waiting for replica in self.replicas)

    @property
    def room(self) -> int:
        """The number of requests to add, so that enough wait."""
        return max(0, self._window - self.num_waiting)

    def add(self, requests: Iterable[Request]) -> None:
        self._line.extend(requests if self._forecaster is None else self._forecaster.classified(list(requests)))

    def advance(self) -> list[FinishedRequest]:
        """Submits what fits, waits until a step in flight is done, and gives the requests that ended with it."""
        self._feed()
        for replica in self.replicas:
            replica.submit()
        finished = [end for replica in self._wait() for end in replica.collect()]
        if self._forecaster is not None:
            self._forecaster.learn(finished)
        return finished

    def _feed(self) -> None:
        """Gives each request to the least loaded replica that takes more; the rest of the line waits."""
        while self._line:
            takers = [replica for replica in self.replicas if replica.scheduler.num_waiting < replica.max_running]
            if not takers:
                return
            min(takers, key=lambda replica: replica.num_open / replica.max_running).add([self._line.popleft()])

    def _wait(self) -> list[Replica]:
        """Waits until a replica is ready. Returns the replicas to collect from: also the idle ones, for failed rows."""
        idle = [replica for replica in self.replicas if not replica.busy]
        busy = [replica for replica in self.replicas if replica.busy]
        if len(busy) <= 1:
            return idle + busy
        ready = [replica for replica in busy if replica.ready()]
        if not ready:
            heard = busy[0].wait(SILENCE_SECONDS, busy[1:])
            ready = [replica for replica in busy if replica.ready()] if heard else busy[:1]
        return idle + ready
