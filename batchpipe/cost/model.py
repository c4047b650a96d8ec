"""What a step costs: the port that profiles, estimates and fits of step time share. Torch-free.

A step's time depends on few quantities (`StepWork`); a `CostModel` turns them into seconds, stage by stage.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from batchpipe.types import BoolArray, Int32Array, LinkUse, Step


@dataclass(frozen=True, slots=True)
class StepWork:
    """One step's work, the same on every stage.

    num_tokens: new tokens of all sequences, the rows of a layer's matrix products.
    num_drawn: sequences that draw a token, the rows of the head's product and of sampling.
    num_decodes: sequences with one new token; decode_context_tokens: the KV tokens that these read, their own included.
    prefill_pairs: (new token, KV token it reads) pairs of all sequences with more than one new token.
    """

    num_tokens: int
    num_drawn: int
    num_decodes: int
    decode_context_tokens: int
    prefill_pairs: int

    @classmethod
    def of(cls, query_lengths: Int32Array, context_lengths: Int32Array, samples: BoolArray) -> StepWork:
        """query_lengths new tokens behind context_lengths tokens, [N] each."""
        decodes = query_lengths == 1
        prefills = ~decodes
        queries = query_lengths[prefills].astype(np.int64)
        pairs = queries * context_lengths[prefills] + queries * (queries + 1) // 2
        return cls(
            num_tokens=int(query_lengths.sum()),
            num_drawn=int(samples.sum()),
            num_decodes=int(decodes.sum()),
            decode_context_tokens=int(context_lengths[decodes].sum()) + int(decodes.sum()),
            prefill_pairs=int(pairs.sum()),
        )

    @classmethod
    def of_step(cls, step: Step) -> StepWork:
        return cls.of(step.query_lengths, step.context_lengths, step.samples)

    @classmethod
    def decode(cls, num_sequences: int, context_tokens: int) -> StepWork:
        """Every sequence draws one token behind its share of `context_tokens`."""
        return cls(num_sequences, num_sequences, num_sequences, context_tokens + num_sequences, 0)

    @classmethod
    def prefill(cls, num_tokens: int, num_sequences: int = 1) -> StepWork:
        """Whole prompts of the same length, `num_tokens` in all."""
        each = num_tokens / max(1, num_sequences)
        return cls(num_tokens, num_sequences, 0, 0, int(num_sequences * each * (each + 1) / 2))


@dataclass(frozen=True, slots=True)
class KvLink:
    """What the link between the two tiers of one stage's KV carries, both directions side by side."""

    load_bytes_per_second: float  # from the host to the device
    store_bytes_per_second: float
    kv_bytes_per_token_layer: int
    num_layers: int  # of the stage

    def __post_init__(self) -> None:
        assert min(self.load_bytes_per_second, self.store_bytes_per_second) > 0
        assert min(self.kv_bytes_per_token_layer, self.num_layers) > 0

    @property
    def kv_bytes_per_token(self) -> int:
        return self.kv_bytes_per_token_layer * self.num_layers

    def block_bytes(self, block_tokens: int) -> int:
        return self.kv_bytes_per_token * block_tokens


class CostModel(Protocol):
    """Seconds of a step on a pipeline of `num_stages` stages."""

    @property
    def num_stages(self) -> int: ...

    @property
    def control_seconds(self) -> float:
        """From the end of a step's last stage until the next step of the same sequences can start on the first."""
        ...

    @property
    def kv_links(self) -> Sequence[KvLink]:
        """By stage; none where nothing is known of them."""
        ...

    @property
    def distinct_stages(self) -> Sequence[int]:
        """One stage of each kind: every other stage takes as long as one of these for any step."""
        ...

    def stage_seconds(self, stage: int, work: StepWork) -> float:
        """How long this stage computes the step."""
        ...

    def handoff_seconds(self, num_tokens: int) -> float:
        """From the end of one stage to the start of the next, for the hidden states of `num_tokens` tokens."""
        ...


def distinct_stages(kinds: Sequence[Hashable]) -> list[int]:
    """The first stage of each kind, and the last stage, which also computes the head."""
    return sorted({kinds.index(kind) for kind in kinds} | {len(kinds) - 1})


def bottleneck_seconds(cost: CostModel, work: StepWork) -> float:
    """How long the slowest stage computes the step."""
    return max(cost.stage_seconds(stage, work) for stage in cost.distinct_stages)


def seconds_without_stalls(stage_seconds: Sequence[float], link_uses: Sequence[LinkUse]) -> list[float]:
    """What each stage computed, of what `StepResult` tells of a step; `link_uses` is empty where there is one tier."""
    if not link_uses:
        return list(stage_seconds)
    return [seconds - use.stall_seconds for seconds, use in zip(stage_seconds, link_uses, strict=True)]
