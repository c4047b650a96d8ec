"""One pipeline stage: its layers, and the KV of these on the device and the host. A sampler follows the last stage."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from batchpipe.attention.choose import choose_backend
from batchpipe.errors import MemoryLimitError
from batchpipe.kv.layout import KvLayout
from batchpipe.kv.pool import KvPool
from batchpipe.model.fused.fuse import fuse
from batchpipe.model.load import load_stage
from batchpipe.pipeline.device_names import device_name
from batchpipe.pipeline.memory import free_bytes
from batchpipe.pipeline.model_runner.base import ModelRunner, StagePart
from batchpipe.pipeline.model_runner.cpu import CpuRunner
from batchpipe.pipeline.model_runner.fitting import FittingRunner, StepRoom, room_beside_steps
from batchpipe.pipeline.model_runner.gpu import GpuRunner
from batchpipe.pipeline.swap.copy_engine import EmulatedLink
from batchpipe.pipeline.swap.kv_swapper import KvSwapper
from batchpipe.sample.sampler import SampledTokens, Sampler
from batchpipe.types import LinkUse, Step


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
    max_batch_sequences: int
    kv_verify: str = "off"
    link: EmulatedLink | None = None  # between the tiers of KV, instead of the machine's own

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1


class StepSampler(Protocol):
    def sample_step(self, step: Step, logits: Tensor) -> SampledTokens:
        """One token of every sequence of the step that samples; logits [N, V] of these, in the step's order."""
        ...


def sampler_of(spec: StageSpec) -> StepSampler | None:
    """The sampler for the last stage's logits; None for other stages."""
    if not spec.is_last:
        return None
    if spec.device == "cpu" or find_spec("triton") is None:
        return Sampler(spec.vocabulary_size, spec.eos_token_ids)
    from batchpipe.sample.device_sampler import DeviceSampler

    return DeviceSampler(spec.vocabulary_size, spec.eos_token_ids, torch.device(spec.device), spec.max_batch_sequences)


class Stage:
    """Loads its layers when made; runs steps after `allocate`, until `close`.

    With host memory for KV, every step is announced before it runs. link_use, corrupt: of the last step, see
    `StepResult`; None and empty with one tier.
    """

    link_use: LinkUse | None = None
    corrupt: dict[int, str]

    def __init__(self, spec: StageSpec) -> None:
        self.spec = spec
        self._device = torch.device(spec.device)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # Triton and pinned memory go by the current device
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        torch.set_num_threads(spec.num_threads)
        self._backend = choose_backend(spec.attention, self._device, self.dtype, spec.kv.head_dim)
        self._part = self._load()
        # On a GPU, what the largest step leaves; see `fitting`.
        self._room: StepRoom | None = None
        if self._device.type == "cuda":
            self._room = room_beside_steps(self._part, spec.hidden_size, self.dtype, self._device)
        self._pool: KvPool | None = None
        self._runner: ModelRunner | None = None
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
        """For KV."""
        return free_bytes(self.spec.device) if self._room is None else self._room.free_bytes

    def allocate(self, num_blocks: int, num_host_blocks: int = 0, streams_per_block: int = 0) -> None:
        """Makes the pools of KV; see `Capacity` for the numbers. Raises MemoryLimitError."""
        num_layers = self.spec.end_layer - self.spec.first_layer
        kv = self.spec.kv
        geometry = (num_layers, kv.num_kv_heads, kv.block_tokens, kv.head_dim, self.dtype)
        self._pool = KvPool(num_blocks, *geometry, self.spec.device)
        self._runner = self._make_runner(self._pool)
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
    def run(self, step: Step, hidden: Tensor | None, sampled_before: Tensor | None = None) -> Tensor:
        """One step: hidden states [T, hidden_size] in (none on the first stage) and out.

        From the last stage: logits [N, vocabulary_size], of the sequences that sample. On a GPU they are valid until
        the next step. sampled_before: see `ModelRunner`.
        """
        assert self._pool is not None and self._runner is not None, "a step before allocate()"
        if self._swapper is None:
            assert step.transfers is None, "transfers where there is one tier"
            self._pool.copy_blocks(step.copied_blocks[:, 0], step.copied_blocks[:, 1])
            return self._runner.run(step, hidden, self._backend, None, sampled_before)
        staging_slots = self._swapper.begin(step)
        self._pool.copy_blocks(step.copied_blocks[:, 0], step.copied_blocks[:, 1])
        output = self._runner.run(step, hidden, self._swapper.backend, staging_slots, sampled_before)
        self.link_use, self.corrupt = self._swapper.finish()
        return output

    @torch.inference_mode()
    def _load(self) -> StagePart:
        spec = self.spec
        try:
            model = load_stage(
                Path(spec.model_folder),
                range(spec.first_layer, spec.end_layer),
                is_first=spec.is_first,
                is_last=spec.is_last,
                dtype=self.dtype,
                device=spec.device,
                trust_remote_code=spec.trust_remote_code,
            )
            if self._backend.name in ("cpu", "triton"):
                fuse(model, self.dtype)
        except torch.OutOfMemoryError as error:
            raise MemoryLimitError(
                f"engine.num_stages: the weights of layers {spec.first_layer} to {spec.end_layer - 1} do not fit "
                f"{spec.device}; ask for more stages, or for a smaller model.dtype ({str(error).splitlines()[0]})"
            ) from None
        return StagePart(
            model=model,
            first_layer=spec.first_layer,
            is_first=spec.is_first,
            is_last=spec.is_last,
            max_step_tokens=spec.max_step_tokens,
            max_batch_sequences=spec.max_batch_sequences,
        )

    def _make_runner(self, pool: KvPool) -> ModelRunner:
        if self._backend.name != "triton":
            return CpuRunner(self._part, pool)
        from batchpipe.attention.triton_attention import TILE_QUERIES

        runner = GpuRunner(self._part, pool, TILE_QUERIES)
        return runner if self._room is None else FittingRunner(runner, self._room.max_tokens)
