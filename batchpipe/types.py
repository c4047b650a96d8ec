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
    INVALID_CSV = "invalid_csv"
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
    # Of OpenAI batch files; the first is of a whole input
    EMPTY_FILE = "empty_file"
    INVALID_JSON_LINE = "invalid_json_line"
    DUPLICATE_CUSTOM_ID = "duplicate_custom_id"
    URL_MISMATCH = "url_mismatch"
    MODEL_MISMATCH = "model_mismatch"
    UNSUPPORTED_PARAMETER = "unsupported_parameter"


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
    keep_special_tokens: bool = False


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
    reasoning: str | None = None


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
    """The KV that a step moves between host and device, the same blocks on every stage.

    V staged blocks, U staging blocks. `loads` are whole blocks that are swapped in before the step computes. Staged
    blocks are swapped in layer by layer while it computes, each through its staging slot. New KV is written to the host
    as well, so that evicting a block needs no copy. The previous step uses none of the device blocks that loads and
    staged layers are written to; so their copies may start as soon as the step before the previous one is done on this
    stage, and overlap with the previous step.
    """

    host_tables: Int32Array  # [N, B]: `Step.block_tables` in host blocks, to which the KV of new tokens is written too
    staging_tables: Int32Array  # [N, B]: the staging slot of the block, 0 to V - 1; -1 if the block is not staged
    loads: Int32Array  # [L, 2]: host block, device block
    staged_blocks: Int32Array  # [V]: the host block of each staging slot
    staging_blocks: Int32Array  # [U]: device blocks, each with the next `Capacity.streams_per_block` staging slots
    host_copies: Int32Array  # [C, 2]: host block to host block, before the step's new tokens are written


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass of one micro-batch, as the scheduler decided it, for every stage.

    N sequences, T = sum(query_lengths) new tokens. The `query_lengths[i]` new tokens of sequence i follow
    `context_lengths[i]` tokens that have their KV in the blocks of its block table; KV of new tokens is written there.
    """

    step_id: int
    sequence_ids: tuple[int, ...]
    query_lengths: Int32Array  # [N]
    context_lengths: Int32Array  # [N]
    token_ids: Int32Array  # [T]; ~k: the k-th token that the step before sampled, see `Capacity.runs_ahead`
    block_tables: Int32Array  # [N, B]; after a sequence's last block, and for a staged block, any valid number
    samples: BoolArray  # [N]: whether a token is sampled after the last new token of this sequence
    copied_blocks: Int32Array  # [C, 2]: before anything else, the KV of block [c, 0] is copied to block [c, 1]
    started: tuple[SequenceStart, ...] = ()
    released: tuple[
        int, ...
    ] = ()  # sequences that ended or were preempted since the last step; their sampler state is freed
    transfers: Transfers | None = None  # None: all KV stays on the device


@dataclass(frozen=True, slots=True)
class LinkUse:
    """Transfers between host and device for one step on one stage.

    stall_seconds is the time for which computing waited for KV; load_seconds and store_seconds are the times for which
    the link was busy in either direction.
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
    """The capacity of a pipeline, for the scheduler: KV blocks (with the same ids on every stage) and steps in flight.

    num_host_blocks: KV blocks in host memory; 0 without offload. streams_per_block: streamed blocks for which one
    staging block has space, two layers of each at a time; 0 if a stage has too few layers for streaming.
    offload: how KV comes back from host memory: `none`, as whole blocks before a step (`batch`), layer by layer during
    the step (`layer`). max_prefills_ahead: steps of prefill alone that may be in flight in addition to the
    `max_batches` micro-batches. runs_ahead: a step may follow the one that samples its tokens before these are known
    here, because they stay on the device; so one more step is in flight.
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
    runs_ahead: bool = False

    @property
    def max_decodes_in_flight(self) -> int:
        """Steps that sample."""
        return self.max_batches + self.runs_ahead

    @property
    def max_in_flight(self) -> int:
        return self.max_decodes_in_flight + self.max_prefills_ahead
