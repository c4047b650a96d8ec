"""The tensors that a stage's model reads in a step, at the same addresses in every step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchpipe.attention.base import AttentionBackend, AttentionInputs
from batchpipe.kv.pool import KvPool
from batchpipe.types import BoolArray, Int32Array


class StepInputs:
    """One stage's input buffers. Every method overwrites some of them and returns views of what the step needs.

    Fixed addresses are what a CUDA graph is captured on; hidden states have theirs in the channel between two stages.
    The buffers are made for `max_step_tokens` and move only if they have to grow.

    One set is enough because the thread that computes fills it, after the model has returned from the step before. On
    the CPU nothing reads the former inputs by then. On a GPU kernels that read them may still be queued, but the copies
    to the device are queued behind these on the same stream, and `copy_` from pageable memory returns only once it has
    read the host's side. Filling by another thread, or pinned host memory, would take two sets in turn.
    """

    def __init__(self, pool: KvPool, *, first_layer: int = 0, max_step_tokens: int = 1) -> None:
        self._pool = pool
        self._first_layer = first_layer
        lengths = (max_step_tokens,)  # a step has no more sequences than tokens
        self._query_lengths = _Buffer(lengths, torch.int32)
        self._context_lengths = _Buffer(lengths, torch.int32)
        self._query_starts = _Buffer((max_step_tokens + 1,), torch.int32)
        self._block_tables = _Buffer((1, 1), torch.int32)
        self._staging_slots = _Buffer((1, 1), torch.int32)
        self._positions = _Buffer(lengths, torch.int64, pool.device)
        self._token_ids = _Buffer(lengths, torch.int32, pool.device)
        self._logit_rows = _Buffer(lengths, torch.int64, pool.device)

    def fill(
        self,
        query_lengths: Int32Array,
        context_lengths: Int32Array,
        block_tables: Int32Array,
        *,
        backend: AttentionBackend,
        staging_slots: Int32Array | None = None,
    ) -> AttentionInputs:
        """What attention needs to know of the next step; see `AttentionInputs` for the shapes."""
        num_tokens = query_lengths + context_lengths
        assert len(query_lengths) == len(context_lengths) == len(block_tables) > 0 and query_lengths.min() > 0
        assert num_tokens.max() <= block_tables.shape[1] * self._pool.block_tokens, "a block table is too short"
        starts = np.zeros(len(query_lengths) + 1, np.int32)
        np.cumsum(query_lengths, out=starts[1:])
        positions = np.arange(starts[-1]) + np.repeat(context_lengths - starts[:-1], query_lengths)
        return AttentionInputs(
            query_lengths=self._query_lengths.write(query_lengths),
            context_lengths=self._context_lengths.write(context_lengths),
            query_starts=self._query_starts.write(starts),
            block_tables=self._block_tables.write(block_tables),
            positions=self._positions.write(positions),
            pool=self._pool,
            backend=backend,
            first_layer=self._first_layer,
            staging_slots=None if staging_slots is None else self._staging_slots.write(staging_slots),
        )

    def device_positions(self, inputs: AttentionInputs) -> Tensor:
        """[T] int64: those of `inputs`, on the pool's device."""
        return self._positions.on_device(inputs.positions)

    def device_token_ids(self, token_ids: Int32Array) -> Tensor:
        """[T] int32 on the pool's device."""
        return self._token_ids.on_device(self._token_ids.write(token_ids))

    def device_logit_rows(self, inputs: AttentionInputs, samples: BoolArray) -> Tensor:
        """int64 on the pool's device: of each sequence that samples (samples [N]) the last of its rows among the T."""
        ends = inputs.query_starts.numpy()[1:]
        return self._logit_rows.on_device(self._logit_rows.write(ends[samples] - 1))


class _Buffer:
    """A tensor on the host and its copy on the device; on the CPU they are one."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self._dtype = dtype
        self._device = torch.device(device)
        self._make(shape)

    def write(self, values: NDArray[Any]) -> Tensor:
        """The view on the host, of the values' shape."""
        if any(size > held for size, held in zip(values.shape, self._host.shape, strict=True)):
            self._make(tuple(max(2 * size, held) for size, held in zip(values.shape, self._host.shape, strict=True)))
        view = self._host[tuple(slice(size) for size in values.shape)]
        view.numpy()[...] = values
        return view

    def on_device(self, view: Tensor) -> Tensor:
        """The same view [n] on the device."""
        if self._on_device is self._host:
            return view
        return self._on_device[: len(view)].copy_(view)

    def _make(self, shape: tuple[int, ...]) -> None:
        self._host = torch.zeros(shape, dtype=self._dtype)
        is_host = self._device.type == "cpu"
        self._on_device = self._host if is_host else torch.zeros(shape, dtype=self._dtype, device=self._device)
