"""One pipeline stage: its layers, and the KV of these on the device and the host. A sampler follows the last stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from batchpipe.attention.base import AttentionBackend
from batchpipe.attention.choose import choose_backend
from batchpipe.attention.step_inputs import StepInputs
from batchpipe.kv.layout import KvLayout
from batchpipe.kv.pool import KvPool
from batchpipe.model.fuse import fuse
from batchpipe.model.load import load_stage
from batchpipe.pipeline.device_names import device_name
from batchpipe.pipeline.memory import free_bytes
from batchpipe.pipeline.swap.copy_engine import EmulatedLink
from batchpipe.pipeline.swap.kv_swapper import KvSwapper
from batchpipe.sample.sampler import Sampler
from batchpipe.types import Int32Array, LinkUse, Step


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """What a stage must know before its first step. It reaches a worker process as MessagePack."""

    index: int
    num_stages: int
    first_layer: int
    end_layer: int
    model_folder: str
    trust_remote_code: bool
    dtype: str
    device: str
    attention: str
    num_threads: int
    cpus: tuple[int, ...]  # processors to stay on; empty: any
    kv: KvLayout
    hidden_size: int
    vocabulary_size: int
    eos_token_ids: tuple[int, ...]
    max_step_tokens: int
    kv_verify: str = "off"
    link: EmulatedLink | None = None  # between the tiers of KV, instead of the machine's own

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1


def sampler_of(spec: StageSpec) -> Sampler | None:
    """The sampler for the last stage's logits; None for other stages."""
    return Sampler(spec.vocabulary_size, spec.eos_token_ids) if spec.is_last else None


class Stage:
    """Loads its layers when made; runs steps after `allocate`, until `close`.

    With host memory for KV, every step is announced before it runs. link_use, corrupt: of the last step, see
    `StepResult`; None and empty with one tier.
    """

    link_use: LinkUse | None = None
    corrupt: dict[int, str]

    def __init__(self, spec: StageSpec) -> None:
        self.spec = spec
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        torch.set_num_threads(spec.num_threads)
        self._backend = choose_backend(spec.attention, torch.device(spec.device), self.dtype, spec.kv.head_dim)
        self._model = load_stage(
            Path(spec.model_folder),
            range(spec.first_layer, spec.end_layer),
            is_first=spec.is_first,
            is_last=spec.is_last,
            dtype=self.dtype,
            device=spec.device,
            trust_remote_code=spec.trust_remote_code,
        )
        if spec.device == "cpu" and self._backend.name == "cpu":
            fuse(self._model, self.dtype)
        self._pool: KvPool | None = None
        self._swapper: KvSwapper | None = None
        self.corrupt = {}

    @property
    def block_tokens(self) -> int:
        return self.spec.kv.block_tokens

    @property
    def bytes_per_block(self) -> int:
        return self.spec.kv.block_bytes(self.spec.end_layer - self.spec.first_layer)

    @property
    def device_name(self) -> str:
        return device_name(self.spec.device, self.spec.num_threads)

    @property
    def free_bytes(self) -> int:
        return free_bytes(self.spec.device)

    def allocate(self, num_blocks: int, num_host_blocks: int = 0, streams_per_block: int = 0) -> None:
        """Makes the pools of KV; see `Capacity` for the numbers. Raises MemoryLimitError."""
        num_layers = self.spec.end_layer - self.spec.first_layer
        kv = self.spec.kv
        geometry = (num_layers, kv.num_kv_heads, kv.block_tokens, kv.head_dim, self.dtype)
        self._pool = KvPool(num_blocks, *geometry, self.spec.device)
        self._inputs = StepInputs(
            self._pool, first_layer=self.spec.first_layer, max_step_tokens=self.spec.max_step_tokens
        )
        if not num_host_blocks:
            return
        pinned = self._pool.device.type == "cuda"
        self._swapper = KvSwapper(
            self._pool,
            KvPool(num_host_blocks, *geometry, pinned=pinned, asked_by="engine.kv_host_memory"),
            self._backend,
            stage_index=self.spec.index,
            streams_per_block=streams_per_block,
            max_step_tokens=self.spec.max_step_tokens,
            kv_verify=self.spec.kv_verify,
            emulated=self.spec.link,
        )

    def announce(self, step: Step) -> None:
        """Starts the step's transfers. Call in the order of the steps, as soon as a step is known, by one thread."""
        if self._swapper is not None:
            self._swapper.announce(step)

    def close(self) -> None:
        if self._swapper is not None:
            self._swapper.close()

    @torch.inference_mode()
    def run(self, step: Step, hidden: Tensor | None) -> Tensor:
        """One step: hidden states [T, hidden_size] in (none on the first stage) and out.

        From the last stage: logits [N, vocabulary_size], of the sequences that sample.
        """
        if self._swapper is None:
            assert step.transfers is None, "transfers where there is one tier"
            return self._compute(step, hidden, self._backend, None)
        staging_slots = self._swapper.begin(step)
        output = self._compute(step, hidden, self._swapper.backend, staging_slots)
        self.link_use, self.corrupt = self._swapper.finish()
        return output

    def _compute(
        self, step: Step, hidden: Tensor | None, backend: AttentionBackend, staging_slots: Int32Array | None
    ) -> Tensor:
        assert self._pool is not None, "a step before allocate()"
        if len(step.copied_blocks):
            self._pool.copy_blocks(step.copied_blocks[:, 0], step.copied_blocks[:, 1])
        inputs = self._inputs.fill(
            step.query_lengths, step.context_lengths, step.block_tables, backend=backend, staging_slots=staging_slots
        )
        source = self._inputs.device_token_ids(step.token_ids) if hidden is None else hidden
        rows = self._inputs.device_logit_rows(inputs, step.samples) if self.spec.is_last else None
        return self._model.forward(inputs, source, self._inputs.device_positions(inputs), rows)
