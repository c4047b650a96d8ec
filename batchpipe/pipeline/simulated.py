"""A pipeline without a model on a clock of its own: what a run would take, from a cost model and known lengths.

Stage s starts a step once it is done with the one before and the hidden states of stage s - 1 have arrived. The
first stage starts no earlier than the controller decided on the step: `control_seconds` after the pipeline's latest
result. Where there is host memory for KV each stage's link to it has a clock, too (`link_clock`), so a step may stall.
Nothing waits in real time, so a plan and a benchmark run the very scheduler that a device run would.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from batchpipe.cost.model import CostModel, KvLink, StepWork
from batchpipe.pipeline.simulated_link import LinkClock, Moved
from batchpipe.types import Capacity, Int32Array, LinkUse, Step, StepResult


class StepKind(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"

    @classmethod
    def of(cls, work: StepWork) -> StepKind:
        if work.num_decodes == work.num_tokens:
            return cls.DECODE
        return cls.MIXED if work.num_decodes else cls.PREFILL


@dataclass(frozen=True, slots=True)
class Passage:
    """A step's way through the stages, from where the first is ready for it to its end on the last.

    stage_seconds: stalls included. link_uses: by stage; none where there is one tier.
    """

    start_seconds: float
    end_seconds: float
    stage_seconds: tuple[float, ...]
    link_uses: tuple[LinkUse, ...]


@dataclass(frozen=True, slots=True)
class SimulatedStep:
    """One step on the virtual clock, from its start on the first stage to its end on the last."""

    kind: StepKind
    start_seconds: float
    end_seconds: float
    num_sequences: int
    num_tokens: int
    link_uses: tuple[LinkUse, ...]  # by stage; none where there is one tier

    @classmethod
    def of(cls, num_sequences: int, work: StepWork, passage: Passage) -> SimulatedStep:
        start, end = passage.start_seconds, passage.end_seconds
        return cls(StepKind.of(work), start, end, num_sequences, work.num_tokens, passage.link_uses)


class SimulatedStages:
    """Stages on a virtual clock. Several pipelines may share them, each with a scheduler and KV of its own.

    links: of each stage to its host memory, for the one pipeline that has a second tier; none where all have one.
    """

    def __init__(self, num_stages: int, links: Sequence[LinkClock] = ()) -> None:
        assert len(links) in (0, num_stages), "a link for every stage"
        self.now_seconds = 0.0
        self._busy_seconds = [0.0] * num_stages
        self._free_seconds = [0.0] * num_stages
        self._links = links
        self._ends_seconds: list[float] = []  # of the steps in flight, those of all pipelines

    @property
    def busy_seconds(self) -> tuple[float, ...]:
        """Seconds of work given to each stage so far, that of steps in flight included."""
        return tuple(self._busy_seconds)

    @property
    def idle_seconds(self) -> tuple[float, ...]:
        """What is left of the time until now for each stage, with its stalls; exact where nothing is in flight."""
        return tuple(self.now_seconds - busy for busy in self._busy_seconds)

    def wait_until(self, seconds: float) -> None:
        """Lets time pass with nothing in flight, until a request arrives."""
        assert not self._ends_seconds, "a step in flight decides how late it is"
        self.now_seconds = max(self.now_seconds, seconds)

    def start(
        self,
        decided_seconds: float,
        stage_seconds: Sequence[float],
        handoff_seconds: float,
        moved: Moved | None = None,
        link_shares: Sequence[float] = (),
    ) -> Passage:
        """Puts a step behind those that were started before.

        moved, link_shares: between the tiers, and what of its rate each stage's link carries.
        """
        submitted = max(self.now_seconds, decided_seconds)
        start = end = max(submitted, self._free_seconds[0])
        times, uses = [], []
        for stage, seconds in enumerate(stage_seconds):
            due = start if stage == 0 else max(self._free_seconds[stage], end + handoff_seconds)
            end = due + seconds
            if moved is not None:
                end, use = self._links[stage].run(moved, submitted, due, seconds, link_shares[stage])
                uses.append(use)
                seconds += use.stall_seconds
            times.append(seconds)
            self._free_seconds[stage] = end
            self._busy_seconds[stage] += stage_seconds[stage]
        self._ends_seconds.append(end)
        return Passage(start, end, tuple(times), tuple(uses))

    def is_next(self, end_seconds: float) -> bool:
        """Whether no step in flight ends before this one."""
        return end_seconds <= min(self._ends_seconds)

    def end(self, end_seconds: float) -> None:
        """The step that ends then is in flight no more."""
        self._ends_seconds.remove(end_seconds)


class SimulatedPipeline:
    """Ends every sequence at its true length: `lengths` gives the tokens of a sequence, its end token included.

    lengths: by random stream (`SequenceStart.stream`), each at least 1.
    stages: those of another pipeline on the same devices; None: stages of its own, as with a second tier they must be.
    links: what the stages' links to host memory really carry; None: what the cost model says of them.
    noise: standard deviation of the logarithm of a factor of mean 1 on the time of every stage and of every link, drawn
    from `seed`.
    """

    def __init__(
        self,
        capacity: Capacity,
        cost: CostModel,
        lengths: Mapping[int, int],
        eos_token_id: int,
        *,
        stages: SimulatedStages | None = None,
        links: Sequence[KvLink] | None = None,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        assert cost.num_stages == capacity.num_stages, "the cost model is one of another pipeline"
        self.capacity = capacity
        self.device_names = ("simulated",) * capacity.num_stages
        self.cost = cost
        self.eos_token_id = eos_token_id
        clocks: list[LinkClock] = []
        if capacity.num_host_blocks:
            assert stages is None, "a second tier on stages of another pipeline"
            links = cost.kv_links if links is None else links
            clocks = [LinkClock(link, capacity.block_tokens, capacity.num_host_blocks) for link in links]
            assert len(clocks) == capacity.num_stages, "nothing is known of the links to host memory"
        self.stages = stages or SimulatedStages(capacity.num_stages, clocks)
        self.steps: list[SimulatedStep] = []
        self._lengths = lengths
        self._noise = noise
        self._random = np.random.default_rng(seed)
        self._decided_seconds = 0.0
        self._in_flight: deque[tuple[Step, SimulatedStep, Passage]] = deque()
        # By sequence id: tokens until the end token is drawn, and whether the sequence was started.
        self._num_left = np.zeros(64, dtype=np.int64)
        self._known = np.zeros(64, dtype=np.bool_)

    def __enter__(self) -> SimulatedPipeline:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._in_flight.clear()

    def submit(self, step: Step) -> None:
        assert len(self._in_flight) < self.capacity.max_in_flight, "more steps in flight than the pipeline holds"
        assert (step.transfers is not None) == (self.capacity.num_host_blocks > 0), "transfers go with a second tier"
        work = StepWork.of_step(step)
        stage_seconds, handoff_seconds = self._stage_seconds(work), self.cost.handoff_seconds(work.num_tokens)
        moved, link_shares = None, []
        if step.transfers is not None:
            moved, link_shares = Moved.of(step, self.capacity.block_tokens), (1.0 / self._noise_factors()).tolist()
        passage = self.stages.start(self._decided_seconds, stage_seconds, handoff_seconds, moved, link_shares)
        self._in_flight.append((step, SimulatedStep.of(len(step.sequence_ids), work, passage), passage))

    def ready(self) -> bool:
        """Whether its oldest step is the first to end of all steps on these stages."""
        return bool(self._in_flight) and self.stages.is_next(self._in_flight[0][1].end_seconds)

    def wait(self, timeout_seconds: float, others: Sequence[SimulatedPipeline] = ()) -> bool:
        return True

    def restart(self) -> None:
        """Steps in flight are lost; the time that they took of the stages is spent all the same."""
        for _, timed, _ in self._in_flight:
            self.stages.end(timed.end_seconds)
        self._in_flight.clear()
        self._known[:] = False

    def collect(self) -> StepResult:
        """The oldest step in flight; time goes on to its end on the last stage."""
        step, timed, passage = self._in_flight.popleft()
        self.stages.end(timed.end_seconds)
        self.stages.now_seconds = max(self.stages.now_seconds, timed.end_seconds)
        self._decided_seconds = self.stages.now_seconds + self.cost.control_seconds
        self.steps.append(timed)
        self._take_starts(step)
        return StepResult(step.step_id, self._next_tokens(step), {}, passage.stage_seconds, passage.link_uses)

    def _stage_seconds(self, work: StepWork) -> tuple[float, ...]:
        factors = self._noise_factors().tolist()
        return tuple(self.cost.stage_seconds(stage, work) * factor for stage, factor in enumerate(factors))

    def _noise_factors(self) -> NDArray[np.float64]:
        """[S], of mean 1: a lognormal factor's mean is 1 where its logarithm's is less by half the variance."""
        if self._noise == 0.0:
            return np.ones(self.capacity.num_stages)
        return np.exp(self._random.normal(-(self._noise**2) / 2, self._noise, self.capacity.num_stages))

    def _take_starts(self, step: Step) -> None:
        for sequence_id in step.released:
            self._known[sequence_id] = False
        for start in step.started:
            if start.sequence_id >= len(self._known):
                num_more = max(len(self._known), start.sequence_id + 1)
                self._known = np.pad(self._known, (0, num_more))
                self._num_left = np.pad(self._num_left, (0, num_more))
            length = self._lengths[start.stream]
            assert length > 0, "a sequence without its end token"
            self._known[start.sequence_id] = True
            self._num_left[start.sequence_id] = length - len(start.generated_token_ids)

    def _next_tokens(self, step: Step) -> Int32Array:
        """The end token for whoever reaches its length with this token, else the number beside it."""
        ids = np.array(step.sequence_ids, dtype=np.intp)
        assert self._known[ids].all(), "a step names a stranger"
        drawn = ids[step.samples]
        self._num_left[drawn] -= 1
        other_token_id = self.eos_token_id - 1 if self.eos_token_id > 0 else 1
        return np.where(self._num_left[drawn] == 0, self.eos_token_id, other_token_id).astype(np.int32)
