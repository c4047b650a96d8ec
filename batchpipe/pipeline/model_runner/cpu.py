"""The model runner of a CPU, and of attention that reads a step's indices there."""

from __future__ import annotations

from torch import Tensor

from batchpipe.attention.base import AttentionBackend
from batchpipe.attention.step_inputs import StepInputs
from batchpipe.kv.pool import KvPool
from batchpipe.pipeline.model_runner.base import StagePart
from batchpipe.types import Int32Array, Step


class CpuRunner:
    """See `ModelRunner`. Also for backends that read a step's indices on the host while the model is on a GPU."""

    def __init__(self, part: StagePart, pool: KvPool) -> None:
        self._part = part
        self._inputs = StepInputs(pool, first_layer=part.first_layer, max_step_tokens=part.max_step_tokens)

    def run(
        self,
        step: Step,
        hidden: Tensor | None,
        backend: AttentionBackend,
        staging_slots: Int32Array | None,
        sampled_before: Tensor | None,
    ) -> Tensor:
        assert sampled_before is None, "the tokens of the step before are known by then"
        inputs = self._inputs.fill(
            step.query_lengths, step.context_lengths, step.block_tables, backend=backend, staging_slots=staging_slots
        )
        source = self._inputs.device_token_ids(step.token_ids) if hidden is None else hidden
        rows = self._inputs.device_logit_rows(inputs, step.samples) if self._part.is_last else None
        return self._part.model.forward(inputs, source, self._inputs.device_positions(inputs), rows)
