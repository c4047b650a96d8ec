"""Decode steps recorded as CUDA graphs, so that a step costs the host one launch instead of hundreds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from batchpipe.attention.device_inputs import DeviceInputs, Padding

logger = logging.getLogger(__name__)

# Numbers of sequences that steps are padded to. Small steps cost the time of reading the weights, whatever their number.
_SEQUENCES = (1, 2, 4, 8, *chain(range(16, 128, 16), range(128, 256, 32), range(256, 4097, 64)))


def padding_of(num_sequences: int, num_items: int) -> Padding | None:
    """What a step of so many decodes and items of KV is padded to; None where it is too large to be worth it.

    A padded item is a program that ends at once, so items may be rounded up generously: to 2**k or 3 * 2**(k - 1).
    """
    padded = next((size for size in _SEQUENCES if size >= num_sequences), None)
    if padded is None:
        return None
    if num_items <= padded:
        return Padding(padded, padded)
    power = 1 << (num_items - 1).bit_length()
    return Padding(padded, max(padded, power if 4 * num_items > 3 * power else 3 * power // 4))


class StepGraphs:
    """Records `forward` once for each padding, when it is used for the second time, and replays it from then on.

    forward: from a step's indices to its output [N, ...], without looking at anything on the device. All graphs share
    one pool of memory and copy their output to one buffer, because they run one after the other.
    """

    def __init__(self, device: torch.device, max_sequences: int) -> None:
        self._device = device
        self._max_sequences = max_sequences
        self._graphs: dict[Padding, torch.cuda.CUDAGraph] = {}
        self._seen: set[Padding] = set()
        self._generation = 0
        self._output: Tensor | None = None
        self._pool: Any = None
        self._fails = False  # the model does what cannot be recorded

    @property
    def are_usable(self) -> bool:
        return not self._fails

    def run(
        self, padding: Padding, inputs: DeviceInputs, generation: int, forward: Callable[[DeviceInputs], Tensor]
    ) -> Tensor:
        """[padding.num_sequences, ...]; valid until the next call. generation: see `DeviceStepInputs`."""
        if generation != self._generation:
            self._graphs.clear()
            self._seen.clear()
            self._generation = generation
        graph = self._graphs.get(padding)
        if graph is None:
            if self._fails or padding not in self._seen:
                self._seen.add(padding)
                return forward(inputs)
            graph = self._record(padding, inputs, forward)
            if graph is None:
                return forward(inputs)
        graph.replay()
        assert self._output is not None
        return self._output[: padding.num_sequences]

    def _record(
        self, padding: Padding, inputs: DeviceInputs, forward: Callable[[DeviceInputs], Tensor]
    ) -> torch.cuda.CUDAGraph | None:
        if self._output is None:
            like = forward(inputs)
            self._output = torch.empty(self._max_sequences, *like.shape[1:], dtype=like.dtype, device=self._device)
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.current_stream(self._device).synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads go on copying KV meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._output[: padding.num_sequences].copy_(forward(inputs))
        except RuntimeError as error:
            self._fails = True
            logger.warning("decode steps of this model cannot be recorded as CUDA graphs, and are slower: %s", error)
            return None
        self._graphs[padding] = graph
        return graph
