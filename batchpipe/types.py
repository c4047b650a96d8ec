"""The values that the parts of batchpipe exchange: rows, requests, steps, results. No behaviour, no torch.

A row is read (`Row`), rendered and tokenised (`Request`), run as one sequence per sample inside `Step`s, and ends as
one `Outcome`. A row that fails before it runs becomes a `FailedRow`. No other values pass from one part to the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa

Int32Array = NDArray[np.int32]
BoolArray = NDArray[np.bool_]


class RowStatus(StrEnum):
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


class ErrorCode(StrEnum):
    """Why a row failed; written to the column `error_code`."""

    INVALID_UTF8 = "invalid_utf8"
    INVALID_JSON = "invalid_json"
    NOT_AN_OBJECT = "not_an_object"
    LINE_TOO_LONG = "line_too_long"
    BAD_ID = "bad_id"
    DUPLICATE_ID = "duplicate_id"
    MISSING_PROMPT = "missing_prompt"
    WRONG_TYPE = "wrong_type"
    EMPTY_PROMPT = "empty_prompt"
    PROMPT_TOO_LONG = "prompt_too_long"
    TEMPLATE_ERROR = "template_error"
    INVALID_MESSAGES = "invalid_messages"
    INVALID_SAMPLING = "invalid_sampling"
    INVALID_TOKEN = "invalid_token"
    INVALID_LOGITS = "invalid_logits"
    KV_CAPACITY = "kv_capacity"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """One row's checked sampling settings; `batchpipe.job.sampling.Sampling` has their meanings and defaults."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    min_tokens: int
    n: int
    seed: int
    logprobs: int


@dataclass(frozen=True, slots=True)
class Carried:
    """A row's carried input columns: row `offset` of an Arrow batch that has exactly the carried columns."""

    batch: pa.RecordBatch
    offset: int


@dataclass(frozen=True, slots=True)
class RowKey:
    """A row's identity: its position in the whole input, its id, its carried columns."""

    index: int
    row_id: str
    carried: Carried


@dataclass(frozen=True, slots=True)
class Row:
    """A row as read, with the values of the columns that its prompt and sampling settings need."""

    key: RowKey
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class FailedRow:
    """A row that failed before it reached the engine. `num_samples` completions are written for it."""

    key: RowKey
    code: ErrorCode
    message: str
    num_samples: int = 1


@dataclass(frozen=True, slots=True)
class Request:
    """A row ready to run. `sampling.max_tokens` is already cut to what the prompt leaves of the model's context.

    length_class: the predictor's class of the row, 0 without a predictor.
    """

    key: RowKey
    prompt_token_ids: Int32Array
    sampling: SamplingParams
    predicted_tokens: int | None = None
    length_class: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probability of a sampled token, and those of the most likely tokens in its place (best first)."""

    token_id: int
    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """One sample as it left the engine: generated tokens, with the end token if one was sampled.

    `text_length` is the number of characters to keep if a stop string ended the text, else None.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    text_length: int | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    error_code: ErrorCode | None = None
    error_message: str | None = None


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """All samples of one request, in sample order, as it leaves the scheduler when the last of them ends."""

    request: Request
    completions: tuple[Completion, ...]


@dataclass(frozen=True, slots=True)
class SampleOutcome:
    """One row of the completions table, without the columns that all samples of an input row share."""

    status: RowStatus
    completion: str | None
    finish_reason: FinishReason | None
    error_code: ErrorCode | None
    error_message: str | None
    completion_tokens: int | None
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one input row, with all its samples, which are written together."""

    key: RowKey
    prompt_tokens: int | None
    predicted_tokens: int | None
    samples: tuple[SampleOutcome, ...]


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """What the sampler must know of a sequence that appears in a step for the first time, or again after a preemption.

    `stream` is the sequence's random stream, a function of (seed, row id, sample index), so that sampling does not
    depend on the batch. `generated_token_ids` holds the tokens generated before the preemption; empty without one.
    """

    sequence_id: int
    stream: int
    sampling: SamplingParams
    prompt_token_ids: Int32Array
    generated_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Transfers:
    """What a step moves between the two tiers of KV, the same on every stage. V streamed blocks, U units.

    Before the step computes, its `loads` are on the device, whole blocks; while it computes, its `streams` pass through
    the device layer by layer. What it computes goes to the host too, so that leaving the device costs nothing. No block
    that loads and streams write to is used by the step before it, so they may begin as soon as the step before that
    one is done on this stage, and run beside the other.
    """

    host_tables: Int32Array  # [N, B]: as `Step.block_tables`, of host blocks; a step's new tokens are written there too
    loads: Int32Array  # [L, 2]: host block, device block
    streams: Int32Array  # [V]: host blocks; block tables name the v-th as `Capacity.num_blocks + v`
    stream_units: Int32Array  # [U]: device blocks the streams pass through, `Capacity.streams_per_block` of them each
    host_copies: Int32Array  # [C, 2]: host block to host block, before the step's new tokens are written


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass of one circulating batch, decided by the scheduler and obeyed by every stage.

    Sequence i brings `query_lengths[i]` new tokens that stand behind `context_lengths[i]` tokens whose KV is already in
    its blocks; new KV goes to the same block table. N sequences, T = sum(query_lengths) tokens.
    """

    step_id: int
    sequence_ids: tuple[int, ...]
    query_lengths: Int32Array  # [N]
    context_lengths: Int32Array  # [N]
    token_ids: Int32Array  # [T]
    block_tables: Int32Array  # [N, B], behind a sequence's last block any valid number
    samples: BoolArray  # [N]: whether a token is sampled after the last new token of this sequence
    copied_blocks: Int32Array  # [C, 2]: before anything else, the KV of block [c, 0] is copied to block [c, 1]
    started: tuple[SequenceStart, ...] = ()
    released: tuple[int, ...] = ()  # sequences that left since the last step: forget their sampler state
    transfers: Transfers | None = None  # None: all KV stays on the device


@dataclass(frozen=True, slots=True)
class LinkUse:
    """What the link between the tiers did for one step on one stage.

    stall_seconds: computing waited for KV. load_seconds, store_seconds: the link was busy in that direction.
    """

    stall_seconds: float = 0.0
    loaded_bytes: int = 0
    stored_bytes: int = 0
    load_seconds: float = 0.0
    store_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of a step. `token_ids[k]` belongs to the k-th sequence that samples; -1: its logits were not finite.

    corrupt: the fault found in a sequence's KV, by sequence id; the token of such a sequence is invalid.
    """

    step_id: int
    token_ids: Int32Array
    logprobs: Mapping[int, TokenLogprobs]  # by sequence id, only where asked for
    compute_seconds: tuple[float, ...]  # by stage, stalls included
    link_uses: tuple[LinkUse, ...] = ()  # by stage; none where there is one tier
    corrupt: Mapping[int, str] = field(default_factory=dict)
    sampling_seconds: float = 0.0  # from logits to tokens

    @property
    def stage_seconds(self) -> tuple[float, ...]:
        """By stage, how long the step kept it: the last stage samples after it has computed."""
        return (*self.compute_seconds[:-1], self.compute_seconds[-1] + self.sampling_seconds)


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a pipeline offers the scheduler: KV blocks, the same ids on every stage, and how many batches circulate.

    num_host_blocks: of the second tier; 0: there is none. streams_per_block: how many streamed blocks pass through one
    device block, two layers of each at a time; 0: a stage has too few layers for that. offload: what comes back from
    the second tier: `none`, whole blocks before a step (`batch`), layers beside it (`layer`), or `both`.
    max_prefills_ahead: so many steps that only prefill may be in flight beside the `max_batches` that circulate.
    """

    num_blocks: int
    block_tokens: int
    num_stages: int
    max_batches: int
    max_step_tokens: int
    max_batch_sequences: int
    num_host_blocks: int = 0
    streams_per_block: int = 0
    offload: str = "none"
    max_prefills_ahead: int = 0

    @property
    def max_in_flight(self) -> int:
        return self.max_batches + self.max_prefills_ahead
