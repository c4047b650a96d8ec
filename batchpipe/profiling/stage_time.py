"""Times steps on one stage, and the pieces beside it: choosing tokens, copying blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from time import perf_counter

import torch

from batchpipe.pipeline.stage import Stage, StageSpec
from batchpipe.pipeline.swap.block_copies import copy_bytes
from batchpipe.profiling.steps import Shape, announcing, build_steps, sequence_start
from batchpipe.sample.sampler import Sampler
from batchpipe.types import Step

# A layer's part of it is far beyond any cache.
_POOL_BYTES = {"cpu": 1 << 30, "cuda": 16 << 30}
_COPIED_BYTES = 256 << 20
_SAMPLED_ROWS = 16
_NUM_REPETITIONS = 9


class TimedStage:
    """The first layers with embedding and head, as if they were the whole model, and KV to read."""

    def __init__(self, spec: StageSpec, num_layers: int) -> None:
        self._stage = Stage(replace(spec, index=0, num_stages=1, first_layer=0, end_layer=num_layers))
        self._sampler = Sampler(spec.vocabulary_size, spec.eos_token_ids)
        pool_bytes = min(_POOL_BYTES[spec.device.split(":")[0]], self._stage.free_bytes // 4)
        self._num_blocks = max(1, pool_bytes // self._stage.bytes_per_block)
        self._stage.allocate(self._num_blocks)
        self.device_name = self._stage.device_name
        self.bytes_per_block = self._stage.bytes_per_block

    def step_seconds(self, shapes: Sequence[Shape], seconds: float) -> dict[Shape, float]:
        """The median time of each shape's step, over rounds through all of them until `seconds` are over.

        Rounds, so that what else the machine does falls on all shapes alike. The first round warms up, and counts
        only where there was no time for a second.
        """
        spec = self._stage.spec
        steps = build_steps(shapes, self._num_blocks, self._stage.block_tokens, spec.vocabulary_size)
        self._run(announcing(steps[0], max(shape.num_sequences for shape in shapes)))
        times: list[list[float]] = [[] for _ in shapes]
        ending = perf_counter() + seconds
        while not times[-1] or perf_counter() < ending:
            for step, kept in zip(steps, times, strict=True):
                if times[-1] and perf_counter() >= ending:
                    break
                started = perf_counter()
                self._run(step)
                _finish(spec.device)
                kept.append(perf_counter() - started)
        return {shape: median(kept[1:] or kept) for shape, kept in zip(shapes, times, strict=True)}

    def prepared(self, shape: Shape) -> Step:
        """A step of this shape."""
        spec = self._stage.spec
        return build_steps([shape], self._num_blocks, self._stage.block_tokens, spec.vocabulary_size)[0]

    def compute(self, step: Step) -> None:
        """Without choosing tokens; a GPU may not have done it yet."""
        self._stage.run(step, None)

    def _run(self, step: Step) -> None:
        self._sampler.sample_step(step, self._stage.run(step, None))


def row_seconds(spec: StageSpec) -> tuple[float, float]:
    """Choosing a token: of a greedy row, and of one drawn at temperature 1 with top_p 0.95."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(_SAMPLED_ROWS, spec.vocabulary_size, generator=generator) * 3
    logits = logits.to(spec.device, getattr(torch, spec.dtype))
    greedy, random = (_sampler_seconds(spec, logits, temperature) for temperature in (0.0, 1.0))
    return greedy / _SAMPLED_ROWS, random / _SAMPLED_ROWS


def _sampler_seconds(spec: StageSpec, logits: torch.Tensor, temperature: float) -> float:
    sampler = Sampler(spec.vocabulary_size, spec.eos_token_ids)
    sequence_ids = range(len(logits))
    for sequence_id in sequence_ids:
        sampler.start(sequence_start(sequence_id, temperature=temperature, top_p=0.95))
    return _median_seconds(lambda: sampler.sample(logits, sequence_ids), spec.device)


def copy_rates(device: str, bytes_per_block: int) -> tuple[float, float]:
    """Bytes per second from host to device and back, a whole block of KV a copy; on the CPU both are its memory."""
    num_blocks = max(1, _COPIED_BYTES // bytes_per_block)
    # Ones, as memory of zeros may have no pages yet.
    pool = torch.ones(num_blocks, bytes_per_block, dtype=torch.uint8, device=device)
    host = torch.ones(num_blocks, bytes_per_block, dtype=torch.uint8, pin_memory=device != "cpu")
    to_device = _median_seconds(lambda: _copy_blocks(host, pool), device)
    to_host = _median_seconds(lambda: _copy_blocks(pool, host), device)
    return pool.nbytes / to_device, pool.nbytes / to_host


def _copy_blocks(source: torch.Tensor, target: torch.Tensor) -> None:
    """As the link between the tiers copies them."""
    for block in range(len(source)):
        copy_bytes(target[block], source[block])


def _median_seconds(work: Callable[[], object], device: str) -> float:
    """Of several repetitions after one that is not counted."""
    times = []
    for _ in range(_NUM_REPETITIONS + 1):
        started = perf_counter()
        work()
        _finish(device)
        times.append(perf_counter() - started)
    return median(times[1:])


def _finish(device: str) -> None:
    """Waits for work that a GPU was only told of."""
    if device != "cpu":
        torch.cuda.synchronize(device)
