"""A pipeline without a model on a virtual clock: the time that a run would take, from a cost model and known lengths.

Stage s starts a step once it has ended the one before and the hidden states of stage s - 1 have arrived. The first
stage starts no earlier than the controller decided on the step, `control_seconds` after the pipeline's latest result.
With host memory for KV the link of each stage has a clock, too (`simulated_link`), so a step may stall. Nothing waits
in real time, so a plan and a benchmark run the same scheduler as a run on devices.
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
class SimulatedStep:
    """One step on the virtual clock, from the time when the first stage is ready for it to its end on the last."""

    kind: StepKind
    num_sequences: int
    num_tokens: int
    start_seconds: float
    end_seconds: float
    stage_seconds: tuple[float, ...]  # stalls included
    link_uses: tuple[LinkUse, ...]  # by stage; none with one tier


class SimulatedStages:
    """Stages on a virtual clock. Several pipelines may share them, each with a scheduler and KV of its own.

    links: one per stage to its host memory, for the only pipeline on stages with a second tier; none with one tier.
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

    def wait_until(self, seconds: float) -> None:
        """Lets time pass with nothing in flight, until a request arrives."""
        assert not self._ends_seconds, "a step in flight decides how late it is"
        self.now_seconds = max(self.now_seconds, seconds)

    def start(
        self,
        work: StepWork,
        num_sequences: int,
        decided_seconds: float,
        stage_seconds: Sequence[float],
        handoff_seconds: float,
        moved: Moved | None = None,
        link_shares: Sequence[float] = (),
    ) -> SimulatedStep:
        """Puts a step behind those that were started before.

        stage_seconds: of computing on each stage. moved: between the tiers. link_shares: the part of its rate that each
        stage's link carries.
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
        kind = StepKind.of(work)
        return SimulatedStep(kind, num_sequences, work.num_tokens, start, end, tuple(times), tuple(uses))

    def is_next(self, end_seconds: float) -> bool:
        """Whether no step in flight ends before this one."""
        return end_seconds <= min(self._ends_seconds)

    def end(self, end_seconds: float) -> None:
        """The step that ends then is no longer in flight."""
        self._ends_seconds.remove(end_seconds)


class SimulatedPipeline:
    """Ends every sequence at its true length: `lengths` gives the tokens of a sequence, its end token included.

    lengths: by random stream (`SequenceStart.stream`), each at least 1.
    stages: those of another pipeline on the same devices; None: stages of its own, which a second tier requires.
    links: the true rates of the stages' links to host memory; None: those of the cost model.
    noise: the time of every stage and every link is multiplied by a lognormal factor of mean 1, whose logarithm has
    this standard deviation; `seed` is that of the factors.
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
        self._in_flight: deque[tuple[Step, SimulatedStep]] = deque()
        # By sequence id: tokens until the end token, and whether the sequence was started.
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
        stage_seconds = self._stage_seconds(work)
        moved, link_shares = None, []
        if step.transfers is not None:
            moved, link_shares = Moved.of(step, self.capacity.block_tokens), (1.0 / self._noise_factors()).tolist()
        timed = self.stages.start(
            work,
            len(step.sequence_ids),
            self._decided_seconds,
            stage_seconds,
            self.cost.handoff_seconds(work.num_tokens),
            moved,
            link_shares,
        )
        self._in_flight.append((step, timed))

    def ready(self) -> bool:
        """Whether its oldest step is the first to end of all steps on these stages."""
        return bool(self._in_flight) and self.stages.is_next(self._in_flight[0][1].end_seconds)

    def wait(self, timeout_seconds: float, others: Sequence[SimulatedPipeline] = ()) -> bool:
        return True

    def restart(self) -> None:
        """Steps in flight are lost, but not the time of the stages that they took."""
        for _, timed in self._in_flight:
            self.stages.end(timed.end_seconds)
        self._in_flight.clear()
        self._known[:] = False

    def collect(self) -> StepResult:
        """The oldest step in flight; time goes on to its end on the last stage."""
        step, timed = self._in_flight.popleft()
        self.stages.end(timed.end_seconds)
        self.stages.now_seconds = max(self.stages.now_seconds, timed.end_seconds)
        self._decided_seconds = self.stages.now_seconds + self.cost.control_seconds
        self.steps.append(timed)
        self._take_starts(step)
        return StepResult(step.step_id, self._next_tokens(step), {}, timed.stage_seconds, timed.link_uses)

    def _stage_seconds(self, work: StepWork) -> tuple[float, ...]:
        factors = self._noise_factors().tolist()
        return tuple(self.cost.stage_seconds(stage, work) * factor for stage, factor in enumerate(factors))

    def _noise_factors(self) -> NDArray[np.float64]:
        """[S], of mean 1: the mean of a lognormal's logarithm is then minus half of its variance."""
        if self._noise == 0.0:
            return np.ones(self.capacity.num_stages)
        return np.exp(self._random.normal(-(self._noise**2) / 2, self._noise, self.capacity.num_stages))

    def _take_starts(self, step: Step) -> None:
        for sequence_id in step.released:
            is_known = sequence_id < len(self._known) and self._known[sequence_id]
            assert is_known, "an unknown sequence is released"
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
        """The end token for each sequence that reaches its length with this token, else another token."""
        ids = np.array(step.sequence_ids, dtype=np.intp)
        assert self._known[ids].all(), "an unknown sequence in a step"
        sampled = ids[step.samples]
        self._num_left[sampled] -= 1
        other_token_id = self.eos_token_id - 1 if self.eos_token_id > 0 else 1
        return np.where(self._num_left[sampled] == 0, self.eos_token_id, other_token_id).astype(np.int32)
