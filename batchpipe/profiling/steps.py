"""Steps of a chosen shape for a stage to be timed with; their tokens mean nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from batchpipe.cost.model import StepWork
from batchpipe.job.sampling import Sampling
from batchpipe.types import SequenceStart, Step

_SHORT_TOKENS = 16
_GREEDY = Sampling(max_tokens=1 << 20, ignore_eos=True).params()


@dataclass(frozen=True)
class Shape:
    """New tokens of each sequence, the tokens behind which they stand, and how many of the first ones draw a token."""

    query_tokens: tuple[int, ...]
    context_tokens: tuple[int, ...]
    num_drawn: int

    @classmethod
    def decodes(cls, num_sequences: int, context_tokens: int, *, drawn: bool = True) -> Shape:
        return cls((1,) * num_sequences, (context_tokens,) * num_sequences, num_sequences if drawn else 0)

    @classmethod
    def prompt(cls, num_tokens: int, context_tokens: int = 0) -> Shape:
        return cls((num_tokens,), (context_tokens,), 0)

    @classmethod
    def short_prompts(cls, num_tokens: int) -> Shape:
        """As many tokens in even prompts so short that attention costs next to nothing."""
        num_prompts = -(-num_tokens // _SHORT_TOKENS)
        few, rest = divmod(num_tokens, num_prompts)
        return cls((few + 1,) * rest + (few,) * (num_prompts - rest), (0,) * num_prompts, 0)

    def __add__(self, other: Shape) -> Shape:
        """Both in one step; this one's sequences must all draw, or the other's none."""
        assert self.num_drawn == len(self.query_tokens) or other.num_drawn == 0
        return Shape(
            self.query_tokens + other.query_tokens,
            self.context_tokens + other.context_tokens,
            self.num_drawn + other.num_drawn,
        )

    @property
    def num_sequences(self) -> int:
        return len(self.query_tokens)

    @property
    def num_tokens(self) -> int:
        return sum(self.query_tokens)

    @property
    def longest_tokens(self) -> int:
        """Of a sequence, new tokens and context together."""
        return max(q + c for q, c in zip(self.query_tokens, self.context_tokens, strict=True))

    @cached_property
    def work(self) -> StepWork:
        queries, contexts = (np.array(values, np.int32) for values in (self.query_tokens, self.context_tokens))
        return StepWork.of(queries, contexts, np.arange(self.num_sequences) < self.num_drawn)


def build_steps(shapes: Sequence[Shape], num_blocks: int, block_tokens: int, vocabulary_size: int) -> list[Step]:
    """One step a shape. The sequences of a step are numbered from 0 and must be known to the sampler.

    Blocks are drawn at random from the whole pool, so sequences may share one: their KV means nothing, and a small
    pool serves long contexts. It must be larger than the processor's caches.
    """
    random = np.random.default_rng(0)
    steps = []
    for number, shape in enumerate(shapes):
        width = -(-shape.longest_tokens // block_tokens)
        steps.append(
            Step(
                step_id=number,
                sequence_ids=tuple(range(shape.num_sequences)),
                query_lengths=np.array(shape.query_tokens, np.int32),
                context_lengths=np.array(shape.context_tokens, np.int32),
                token_ids=random.integers(0, vocabulary_size, shape.num_tokens, dtype=np.int32),
                block_tables=random.integers(0, num_blocks, (shape.num_sequences, width), dtype=np.int32),
                samples=np.arange(shape.num_sequences) < shape.num_drawn,
                copied_blocks=np.empty((0, 2), np.int32),
            )
        )
    return steps


def announcing(step: Step, num_sequences: int) -> Step:
    """The step, with `num_sequences` greedy sequences announced to the sampler before it."""
    return replace(step, started=tuple(map(sequence_start, range(num_sequences))))


def sequence_start(sequence_id: int, *, temperature: float = 0.0, top_p: float = 1.0) -> SequenceStart:
    """A sequence that never ends."""
    sampling = replace(_GREEDY, temperature=temperature, top_p=top_p)
    return SequenceStart(sequence_id, sequence_id, sampling, np.zeros(1, np.int32), ())
