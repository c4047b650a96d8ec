"""Random sequences in scattered blocks, for holding one attention backend against another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from batchpipe.attention.base import AttentionBackend, AttentionInputs, AttentionOptions
from batchpipe.attention.device_inputs import DeviceStepInputs
from batchpipe.attention.step_inputs import StepInputs
from batchpipe.kv.pool import KvPool
from batchpipe.types import Int32Array


@dataclass(kw_only=True)
class PagedCase:
    """Whole sequences' query, key and value rows, and where their KV goes: `tables[i]` are the blocks of sequence i."""

    lengths: list[int]
    queries: torch.Tensor  # [sum(lengths), Hq, D]
    keys: torch.Tensor  # [sum(lengths), Hkv, D]
    values: torch.Tensor
    tables: np.ndarray
    block_tokens: int
    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    starts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])

    @classmethod
    def make(
        cls,
        *,
        lengths: list[int],
        group: int,
        block_tokens: int,
        num_kv_heads: int = 2,
        head_dim: int = 16,
        dtype: torch.dtype = torch.float32,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        seed: int = 0,
    ) -> PagedCase:
        generator = torch.Generator().manual_seed(seed)
        total, num_heads = sum(lengths), group * num_kv_heads

        def rows(heads: int) -> torch.Tensor:
            return torch.randn(total, heads, head_dim, generator=generator).to(dtype)

        width = -(-max(lengths) // block_tokens)
        blocks = torch.randperm(len(lengths) * width + 1, generator=generator)[1:]
        return cls(
            lengths=lengths,
            queries=rows(num_heads),
            keys=rows(num_kv_heads),
            values=rows(num_kv_heads),
            tables=blocks.reshape(len(lengths), width).numpy().astype(np.int32),
            block_tokens=block_tokens,
            scale=1.5 * head_dim**-0.5,
            sliding_window=sliding_window,
            softcap=softcap,
            sinks=torch.randn(num_heads, generator=generator).to(dtype) if sinks else None,
        )

    def sequence(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        part = slice(int(self.starts[index]), int(self.starts[index + 1]))
        return self.queries[part], self.keys[part], self.values[part]


def attend_in_chunks(backend: AttentionBackend, case: PagedCase, chunk_tokens: int) -> list[torch.Tensor]:
    """Each sequence's [length, Hq, D], in steps of up to `chunk_tokens` new tokens of every unfinished sequence.

    The first sequence goes token by token, so that most steps mix decodes with prefill chunks. The layer under test
    lies between two that must stay as they are.
    """
    num_kv_heads, head_dim = case.keys.shape[1:]
    geometry = (num_kv_heads, case.block_tokens, head_dim, case.keys.dtype, case.keys.device)
    pool = KvPool(case.tables.size + 1, 3, *geometry)
    pool.data[:, 0], pool.data[:, 2] = 3, 5
    done = np.zeros(len(case.lengths), np.int32)
    fill = _device_fill(backend, pool, case) if backend.name == "triton" else _host_fill(backend, pool)
    outputs: list[list[torch.Tensor]] = [[] for _ in case.lengths]
    while (todo := np.flatnonzero(done < case.lengths)).size:
        limits = np.where(todo == 0, 1, chunk_tokens)
        new = np.minimum(np.asarray(case.lengths)[todo] - done[todo], limits).astype(np.int32)
        rows = np.concatenate([np.arange(n) + case.starts[i] + done[i] for i, n in zip(todo, new, strict=True)])
        inputs = fill(new, done[todo], case.tables[todo])
        options = AttentionOptions(case.scale, case.sliding_window, case.softcap, case.sinks)
        output = backend.forward(inputs, 1, case.queries[rows], case.keys[rows], case.values[rows], options)
        assert output.dtype == case.queries.dtype and output.is_contiguous()
        for i, part in zip(todo, output.split(new.tolist()), strict=True):
            outputs[i].append(part)
        done[todo] += new
    assert (pool.data[:, 0] == 3).all() and (pool.data[:, 2] == 5).all()
    return [torch.cat(parts) for parts in outputs]


Fill = Callable[[Int32Array, Int32Array, Int32Array], AttentionInputs]


def _host_fill(backend: AttentionBackend, pool: KvPool) -> Fill:
    step_inputs = StepInputs(pool)
    return lambda new, done, tables: step_inputs.fill(new, done, tables, backend=backend)


def _device_fill(backend: AttentionBackend, pool: KvPool, case: PagedCase) -> Fill:
    step_inputs = DeviceStepInputs(
        pool.device, pool.block_tokens, max_tokens=sum(case.lengths), max_sequences=len(case.lengths), tile_queries=64
    )

    def fill(new: Int32Array, done: Int32Array, tables: Int32Array) -> AttentionInputs:
        no_tokens, samples = np.zeros(int(new.sum()), np.int32), np.ones(len(new), np.bool_)
        return AttentionInputs.of_device(step_inputs.fill(no_tokens, new, done, tables, samples), pool, backend, 0)

    return fill
