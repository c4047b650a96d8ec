"""Steps recorded as CUDA graphs, so that a step costs the host one launch instead of hundreds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from batchpipe.attention.device_inputs import DeviceInputs, Padding

logger = logging.getLogger(__name__)

# What steps are padded to. Small ones take the time of reading the weights, whatever their size; for large ones the
# host's launches are soon hidden behind the device's work.
_SEQUENCES = (1, 2, 4, 8, 16, 32, *range(64, 4097, 64))
_TOKENS = (*_SEQUENCES[:-1], *chain(range(4096, 8193, 512)))
_MOST_TOKENS = 2048


def padding_of(
    num_tokens: int, num_sequences: int, num_items: int, num_tiles: int, *, has_long_decodes: bool
) -> Padding | None:
    """What a step of this size is padded to; None where it is too large to be worth it.

    A padded item or tile is a program that ends at once, so both are rounded up generously.
    """
    if num_tokens > _MOST_TOKENS:
        return None
    sequences = _least(_SEQUENCES, num_sequences)
    return Padding(
        num_tokens=sequences if num_tokens == num_sequences else _least(_TOKENS, num_tokens),
        num_sequences=sequences,
        num_items=sequences << max(0, (-(-num_items // sequences) - 1).bit_length()) if num_items else 0,
        num_tiles=1 << (num_tiles - 1).bit_length() if num_tiles else 0,
        has_long_decodes=has_long_decodes,
    )


def most_padded(max_tokens: int) -> int:
    """Tokens of a step of up to `max_tokens`, once it is padded."""
    return max(max_tokens, _least(_TOKENS, min(max_tokens, _MOST_TOKENS)))


def _least(sizes: tuple[int, ...], wanted: int) -> int:
    return next(size for size in sizes if size >= wanted)


class StepGraphs:
    """Records `forward` once for each padding and replays it from then on.

    forward: from a step's indices to its output [N, ...], without looking at anything on the device. All graphs share
    one pool of memory and copy their output to one buffer, because they run one after the other.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Padding, tuple[torch.cuda.CUDAGraph, int]] = {}  # with the length of its output
        self._kinds: set[tuple[bool, bool, bool]] = set()  # of steps, whose kernels are compiled
        self._generation = 0
        self._output: Tensor | None = None
        self._pool: Any = None
        self._stream = torch.cuda.Stream(device)
        self.are_usable = True  # until the model does what cannot be recorded

    def run(
        self, padding: Padding, inputs: DeviceInputs, generation: int, forward: Callable[[DeviceInputs], Tensor]
    ) -> Tensor:
        """[padding.num_sequences, ...]; valid until the next call. generation: see `DeviceStepInputs`."""
        if generation != self._generation:
            self._graphs.clear()
            self._generation = generation
        recorded = self._graphs.get(padding)
        if recorded is None:
            kind = (padding.num_items > 0, padding.num_tiles > 0, padding.has_long_decodes)
            if kind not in self._kinds:
                self._kinds.add(kind)
                return forward(inputs)
            recorded = self._record(padding, inputs, forward)
            if recorded is None:
                return forward(inputs)
        graph, length = recorded
        graph.replay()
        assert self._output is not None
        return self._output[:length]

    def _record(
        self, padding: Padding, inputs: DeviceInputs, forward: Callable[[DeviceInputs], Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, int] | None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        # Other threads go on copying KV. `torch.cuda.graph` would collect garbage and give cached memory back.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = forward(inputs)
                if self._output is not None and len(self._output) >= len(output):
                    self._output[: len(output)].copy_(output)
                graph.capture_end()
            except RuntimeError as error:
                self._give_up(graph, error)
                return None
        current.wait_stream(self._stream)
        if self._output is None or len(self._output) < len(output):  # known only now; then once more
            self._output = output.new_empty(max(2 * len(output), _SEQUENCES[8]), *output.shape[1:])
            self._graphs.clear()
            return self._record(padding, inputs, forward)
        self._graphs[padding] = (graph, len(output))
        return self._graphs[padding]

    def _give_up(self, graph: torch.cuda.CUDAGraph, error: RuntimeError) -> None:
        """The capture is over, one way or the other."""
        self.are_usable = False
        logger.warning("steps of this model cannot be recorded as CUDA graphs, and are slower: %s", error)
        try:
            graph.capture_end()
        except RuntimeError as ending:
            logger.debug("the recording ended with: %s", ending)
