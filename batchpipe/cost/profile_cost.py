"""The cost model that a profile's tables make."""

from __future__ import annotations

from collections.abc import Sequence

from batchpipe.cost.curve import Curve, Surface
from batchpipe.cost.model import StepWork, distinct_stages
from batchpipe.cost.profile import Profile, StepTimes
from batchpipe.kv.layout import KvLayout


class TimedSteps:
    """Seconds of a step on a stage of `num_layers` layers, summed from the tables.

    random_share: of the rows that draw a token, those that are not greedy.
    """

    def __init__(self, times: StepTimes, random_share: float = 0.0) -> None:
        self._step = Curve.of(times.step_seconds)
        self._layer = Curve.of(times.layer_seconds)
        self._head = Curve.of(times.head_seconds)
        attention = sorted(times.decode_attention_seconds.items())
        self._decode_attention = Surface(tuple(n for n, _ in attention), tuple(Curve.of(p) for _, p in attention))
        self._prefill_attention = Curve.of(times.prefill_attention_seconds)
        random_row_seconds = times.random_row_seconds - times.greedy_row_seconds
        self._row_seconds = times.greedy_row_seconds + random_share * random_row_seconds

    def seconds(self, work: StepWork, num_layers: int, *, is_last: bool) -> float:
        layer_seconds = self._layer.at(work.num_tokens)
        if work.num_decodes:
            # The table's context does not count the new token itself.
            context_tokens = work.decode_context_tokens / work.num_decodes - 1
            layer_seconds += self._decode_attention.at(work.num_decodes, context_tokens)
        if work.prefill_pairs:
            layer_seconds += self._prefill_attention.at(work.prefill_pairs)
        seconds = self._step.at(work.num_tokens) + num_layers * layer_seconds
        if is_last and work.num_drawn:
            seconds += self._head.at(work.num_drawn) + work.num_drawn * self._row_seconds
        return seconds


class ProfileCost:
    """A `CostModel` of stages that hold `layers` each, every one on a device like the one measured."""

    def __init__(self, profile: Profile, layers: Sequence[range], random_share: float = 0.0) -> None:
        self.link = profile.link
        self.control_seconds = profile.control_seconds
        self._steps = TimedSteps(profile.times, random_share)
        self._num_layers = [len(one) for one in layers]
        self.distinct_stages = distinct_stages(self._num_layers)
        kv = KvLayout.of(profile.model)
        self._hidden_bytes_per_token = profile.model.hidden_size * kv.item_bytes
        self.kv_links = profile.link.kv_links(kv.bytes_per_token_layer, layers)

    @property
    def num_stages(self) -> int:
        return len(self._num_layers)

    def stage_seconds(self, stage: int, work: StepWork) -> float:
        return self._steps.seconds(work, self._num_layers[stage], is_last=stage == self.num_stages - 1)

    def handoff_seconds(self, num_tokens: int) -> float:
        return self.link.handoff_seconds(num_tokens * self._hidden_bytes_per_token)
