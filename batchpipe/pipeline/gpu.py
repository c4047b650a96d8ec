"""One stage on one GPU, told of the next step before the tokens of the last one have reached the host.

    host   │ plan i+1, launch i+1 │ take i's tokens │ plan i+2, launch i+2 │ take i+1's tokens │
    GPU    │ step i                       │ step i+1                            │ step i+2

A step's token ids stay on the device, where the next step finds them, so the GPU never waits for the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from batchpipe.pipeline.memory import StageMemory
from batchpipe.pipeline.stage import Stage, StageSpec
from batchpipe.sample.device_sampler import DeviceSampler, PendingTokens
from batchpipe.types import Capacity, LinkUse, Step, StepResult


@dataclass(frozen=True, slots=True)
class _InFlight:
    step: Step
    begun: torch.cuda.Event
    computed: torch.cuda.Event
    tokens: PendingTokens
    link_use: LinkUse | None
    corrupt: dict[int, str]


class GpuPipeline:
    """See `Pipeline`. `capacity_of` turns what the loaded stage reports into the capacity to offer."""

    def __init__(self, spec: StageSpec, capacity_of: Callable[[Sequence[StageMemory]], Capacity]) -> None:
        assert spec.num_stages == 1
        self._device = torch.device(spec.device)
        torch.cuda.set_device(self._device)
        self._stage = Stage(spec)
        stage = self._stage
        self.device_names = (stage.device_name,)
        offered = capacity_of([StageMemory(stage.free_bytes, stage.bytes_per_block, stage.block_tokens)])
        # With two tiers the results of a step decide what the next one moves.
        self.capacity = replace(offered, runs_ahead=offered.num_host_blocks == 0)
        stage.allocate(offered.num_blocks, offered.num_host_blocks, offered.streams_per_block)
        self._sampler = DeviceSampler(spec.vocabulary_size, spec.eos_token_ids, self._device, spec.max_batch_sequences)
        self._in_flight: deque[_InFlight] = deque()

    def __enter__(self) -> GpuPipeline:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._in_flight.clear()
        self._stage.close()
        # The weights and the KV go with them, for a next job of this process.
        del self._stage, self._sampler
        torch.cuda.empty_cache()

    def submit(self, step: Step) -> None:
        assert len(self._in_flight) < self.capacity.max_in_flight, "more steps in flight than the pipeline holds"
        self._stage.announce(step)
        begun, computed = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self._device)
        begun.record(stream)
        logits = self._stage.run(step, None, self._sampler.sampled)
        computed.record(stream)
        tokens = self._sampler.launch(step, logits)
        self._in_flight.append(
            _InFlight(step, begun, computed, tokens, self._stage.link_use, dict(self._stage.corrupt))
        )

    def collect(self) -> StepResult:
        one = self._in_flight.popleft()
        sampled = self._sampler.take(one.tokens)
        return StepResult(
            one.step.step_id,
            sampled.token_ids,
            sampled.logprobs,
            (one.begun.elapsed_time(one.computed) / 1e3,),
            () if one.link_use is None else (one.link_use,),
            one.corrupt,
            one.computed.elapsed_time(one.tokens.done) / 1e3,
        )

    def ready(self) -> bool:
        return bool(self._in_flight)

    def wait(self, timeout_seconds: float, others: Sequence[GpuPipeline] = ()) -> bool:
        return True

    def restart(self) -> None:
        raise AssertionError("there is no process here that could be lost")
