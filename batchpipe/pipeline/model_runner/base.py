"""Runs a stage's model over a step: from the step's arrays and hidden states to hidden states or logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from batchpipe.attention.base import AttentionBackend
from batchpipe.model.load import StageModel
from batchpipe.types import Int32Array, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePart:
    """The model of one stage, and what its steps look like at most."""

    model: StageModel
    first_layer: int
    is_first: bool
    is_last: bool
    max_step_tokens: int
    max_batch_sequences: int


class ModelRunner(Protocol):
    def run(
        self,
        step: Step,
        hidden: Tensor | None,
        backend: AttentionBackend,
        staging_slots: Int32Array | None,
        sampled_before: Tensor | None,
    ) -> Tensor:
        """hidden [T, hidden_size], None on the first stage -> the same, or logits [N, V] on the last one.

        staging_slots: see `AttentionInputs`. sampled_before [max_batch_sequences]: the tokens that the step before
        sampled, on the device, where some of the step's `token_ids` stand for them; None where none does.
        """
        ...
