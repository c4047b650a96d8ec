"""What replays share: measured tables as cost models, workloads of known lengths, a predictor with a known error.

The data folder holds the tables and traces under the names of their publishers: TD-Pipe's profiles of L20 cards
(github.com/MLSysU/TD-Pipe), Azure's and etalon's traces, ShareGPT lengths, and the errors of a length classifier
(github.com/James-QiuHaoran/LLM-serving-with-proxy-models).
"""

from __future__ import annotations

import csv
import json
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchpipe.cost.model import StepWork
from batchpipe.job.sampling import Sampling
from batchpipe.predict.base import Survival
from batchpipe.sample.rng import stream_of
from batchpipe.types import BoolArray, Carried, Int32Array, Request, RowKey, SamplingParams

EOS_TOKEN_ID = 0
NUM_CLASSES = 5
# TD-Pipe reports 0.52 to 0.58 for its three models.
PREDICTOR_ACCURACY = 0.55
_GREEDY = Sampling().params()
_NOTHING = pa.RecordBatch.from_pylist([{}], schema=pa.schema([]))


def lines_of(path: Path) -> Iterator[str]:
    with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as file:
        yield from file


def columns_of(path: Path) -> dict[str, list[str]]:
    """A CSV file, compressed or not, by column."""
    names, *rows = csv.reader(lines_of(path))
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


# -- workloads ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lengths:
    """Prompt and completion tokens of N requests, [N] each, the end token counted, and what a context may hold."""

    prompt_tokens: Int32Array
    output_tokens: Int32Array
    context_tokens: int

    def draw(self, num_requests: int, seed: int) -> Lengths:
        rows = np.random.default_rng(seed).integers(0, len(self.prompt_tokens), num_requests)
        return Lengths(self.prompt_tokens[rows], self.output_tokens[rows], self.context_tokens)


def read_lengths(data: Path, name: str) -> Lengths:
    """All lengths of a trace, less what TD-Pipe's filter takes from ShareGPT; else what 4,096 tokens do not hold."""
    if name == "sharegpt":
        rows = [json.loads(line) for line in lines_of(data / "prompts/sharegpt_prompts.jsonl.xz")]
        prompt, output = ([row[key] for row in rows] for key in ("in_tok", "out_tok"))
        limits = (1024, 2048)
    else:
        columns = columns_of(data / f"traces/trace_{name}.csv.xz")
        prompt, output = columns["in_tok"], columns["out_tok"]
        limits = (1024, 2048) if "sharegpt" in name else (2048, 4096)
    prompt_tokens, output_tokens = np.array(prompt, np.int32), np.array(output, np.int32)
    kept = (prompt_tokens >= 4) & (output_tokens >= 4)
    kept &= (prompt_tokens <= limits[0]) & (prompt_tokens + output_tokens <= limits[1])
    return Lengths(prompt_tokens[kept], output_tokens[kept], limits[1])


def requests_of(lengths: Lengths) -> tuple[list[Request], dict[int, int]]:
    """Requests of these lengths, and the length by stream. A prompt repeats its own number, so no two begin alike."""
    requests, by_stream = [], {}
    for index, num_prompt in enumerate(lengths.prompt_tokens.tolist()):
        sampling = sampling_of(lengths.context_tokens - num_prompt)
        prompt = np.full(num_prompt, index, dtype=np.int32)
        requests.append(Request(RowKey(index, str(index), Carried(_NOTHING, 0)), prompt, sampling))
        by_stream[stream_of(sampling.seed, str(index), 0)] = int(lengths.output_tokens[index])
    return requests, by_stream


def sampling_of(max_tokens: int) -> SamplingParams:
    return replace(_GREEDY, max_tokens=max_tokens)


# -- a predictor with a known error --------------------------------------------------------------------------------


class ReplayPredictor:
    """Classes as a real classifier of five length quantiles would give them, right with `PREDICTOR_ACCURACY`.

    A row's class is drawn from the errors that the classifier made at the same quantile of length; a part of the rows
    gets any class, which brings the accuracy down to the one wanted. Curves are measured by predicted class on another
    draw of the same population, so that they are calibrated and know nothing of the run's own rows.
    """

    def __init__(self, data: Path, population: Lengths, lengths: Lengths, seed: int) -> None:
        columns = columns_of(data / "traces/predictor_errors_vicuna13b_85k.csv.xz")
        order = np.argsort(np.array(columns["out_tok"], np.int32), kind="stable")
        self._predicted = np.array(columns["pred_class5"], np.int32)[order]  # by true length
        self._sorted_population = np.sort(population.output_tokens)
        # The classes of that classifier end at these quantiles of the true lengths (TD-Pipe's and mu-Serve's recipe).
        self._class_ends = np.array([0.25, 0.5, 0.75, 0.99])
        random = np.random.default_rng(seed)
        known = population.draw(20_000, seed + 1_000_003).output_tokens
        known_classes = self._draw_classes(known, random)
        self._classes = self._draw_classes(lengths.output_tokens, random)
        self._survival = measured_survival(known_classes, known)
        self.accuracy = float((self._true_classes(lengths.output_tokens) == self._classes).mean())

    def classify(self, prompts: Sequence[Int32Array]) -> Int32Array:
        """By the request's number, of which its prompt is made."""
        return self._classes[[int(prompt[0]) for prompt in prompts]]

    def observe(self, classes: Int32Array, num_tokens: Int32Array, ended: BoolArray) -> None:
        """The curves were measured beforehand, as TD-Pipe's are: a run's own rows change nothing."""

    def survival(self, running_classes: Int32Array, running_tokens: Int32Array) -> Survival:
        return self._survival

    def _quantiles(self, tokens: Int32Array) -> NDArray[np.float64]:
        left = np.searchsorted(self._sorted_population, tokens, side="left")
        right = np.searchsorted(self._sorted_population, tokens, side="right")
        middle: NDArray[np.float64] = (left + right) / 2 / len(self._sorted_population)
        return middle

    def _true_classes(self, tokens: Int32Array) -> Int32Array:
        return np.searchsorted(self._class_ends, self._quantiles(tokens)).astype(np.int32)

    def _draw_classes(self, tokens: Int32Array, random: np.random.Generator) -> Int32Array:
        quantiles = np.clip(self._quantiles(tokens) + random.normal(0, 0.002, len(tokens)), 0, 1)
        rows = np.minimum((quantiles * len(self._predicted)).astype(np.int64), len(self._predicted) - 1)
        classes = self._predicted[rows]
        accuracy = float((classes == self._true_classes(tokens)).mean())
        share = max(0.0, (accuracy - PREDICTOR_ACCURACY) / (accuracy - 1 / NUM_CLASSES))
        any_class = random.integers(0, NUM_CLASSES, len(tokens)).astype(np.int32)
        return np.where(random.random(len(tokens)) < share, any_class, classes)


def measured_survival(classes: Int32Array, tokens: Int32Array) -> Survival:
    """P(length > t) of each class, on a grid of every 16 tokens at first and 64 later."""
    last = int(tokens.max())
    grid = np.unique(np.concatenate([np.arange(0, 512, 16), np.arange(512, last, 64), [last]])).astype(np.int32)
    alive = np.zeros((NUM_CLASSES, len(grid)))
    for row in range(NUM_CLASSES):
        own = np.sort(tokens[classes == row])
        alive[row] = 1 - np.searchsorted(own, grid, side="right") / len(own)
    return Survival(grid, alive)


# -- TD-Pipe's profiles as cost models -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One card of a node: what it reads, computes and sends a second."""

    kv_bytes_per_second: float
    attention_flops_per_second: float
    link_bytes_per_second: float
    all_reduce_bytes_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfiledModel:
    """A model of 16-bit values and its KV blocks of 16 tokens on four cards."""

    profile: str
    num_layers: int
    hidden_size: int
    kv_bytes_per_token: int
    num_blocks: int


# 864 GB/s less a fifth, as paged attention reaches; attention at half the 119.5 TFLOP/s; PCIe 4.0 less a fifth;
# all-reduce as TD-Pipe's paper measured it.
L20 = Card(
    kv_bytes_per_second=0.8 * 864e9,
    attention_flops_per_second=0.5 * 119.5e12,
    link_bytes_per_second=0.8 * 32e9,
    all_reduce_bytes_per_second=14.65e9,
)
MODELS = {
    "13b": ProfiledModel(
        profile="L20-Llama-13B.csv", num_layers=40, hidden_size=5120, kv_bytes_per_token=819_200, num_blocks=10_600
    ),
    "32b": ProfiledModel(
        profile="L20-Qwen2.5-32B.csv", num_layers=64, hidden_size=5120, kv_bytes_per_token=262_144, num_blocks=23_800
    ),
}


def read_curve(path: Path) -> list[float]:
    """Seconds of a forward of so many tokens, from 0; beyond the last one measured, straight on to twice as many."""
    columns = columns_of(path)
    tokens, milliseconds = ([float(value) for value in columns[name]] for name in ("Total Length", "Execute Time"))
    last = len(tokens)
    assert tokens == list(range(1, last + 1)), f"{path}: a token count is missing"
    curve = [0.0] + [each / 1e3 for each in milliseconds]
    token_seconds = (curve[last] - curve[last // 2]) / (last - last // 2)
    return curve + [curve[last] + more * token_seconds for more in range(1, last + 1)]


class CurveCost:
    """A measured curve, tokens of a forward to seconds of the whole model, cut evenly over cards.

    The curve has no axis of context: decodes add their KV's reading, and chunks the attention to what stands before
    them, which a prompt measured whole does not have. A stage a card, which hands hidden states and residuals on;
    or, where `tensor_parallel`, one stage of all cards with two all-reduces a layer.
    """

    def __init__(
        self,
        data: Path,
        model: ProfiledModel,
        card: Card,
        *,
        num_cards: int,
        tensor_parallel: bool,
        control_seconds: float,
    ) -> None:
        self.num_stages = 1 if tensor_parallel else num_cards
        self.control_seconds = control_seconds
        self.kv_links = ()
        self.distinct_stages = (0,)  # layers are cut evenly
        self._card_seconds = [
            seconds / num_cards for seconds in read_curve(data / "profiles/tdpipe_L20" / model.profile)
        ]
        self._kv_seconds = model.kv_bytes_per_token / num_cards / card.kv_bytes_per_second
        self._pair_seconds = 4 * model.hidden_size * model.num_layers / num_cards / card.attention_flops_per_second
        hidden_bytes = 2 * model.hidden_size
        self._handoff_seconds = 2 * hidden_bytes / card.link_bytes_per_second
        all_reduce_seconds = 2 * model.num_layers * hidden_bytes / card.all_reduce_bytes_per_second
        self._all_reduce_seconds = all_reduce_seconds if tensor_parallel else 0.0

    def stage_seconds(self, stage: int, work: StepWork) -> float:
        num_prefill_tokens = work.num_tokens - work.num_decodes
        measured_pairs = num_prefill_tokens * (num_prefill_tokens + 1) // 2
        return (
            self._card_seconds[work.num_tokens]
            + work.decode_context_tokens * self._kv_seconds
            + max(0, work.prefill_pairs - measured_pairs) * self._pair_seconds
            + work.num_tokens * self._all_reduce_seconds
        )

    def handoff_seconds(self, num_tokens: int) -> float:
        return num_tokens * self._handoff_seconds
