"""What a step costs by the rooflines of Williams et al. (CACM 2009): where nothing has been measured yet.

Each part of a step takes as long as the slower of its arithmetic and its reading of memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from batchpipe.cost.hardware import Hardware, Link
from batchpipe.cost.model import StepWork, distinct_stages
from batchpipe.cost.model_shape import ModelShape
from batchpipe.model.partition import split_layers


@dataclass(frozen=True, slots=True)
class _Product:
    """`count` matrix products alike: operations of one row, bytes of the weight, what of it one row touches."""

    count: int
    flops: float
    weight_bytes: float
    touched_share: float

    def seconds(self, rows: int, flops_per_second: float, bytes_per_second: float) -> float:
        # Rows choose their experts apart from each other; of a dense weight the first row touches all.
        weight_bytes = self.weight_bytes * (1.0 - (1.0 - self.touched_share) ** rows)
        return self.count * max(rows * self.flops / flops_per_second, weight_bytes / bytes_per_second)


class RooflineCost:
    """A `CostModel` of stages that hold `layers` each, one of `pipeline` or `tensor_parallel`.

    Every stage is `num_shards` devices that split each product between them and sum their parts twice a layer
    (Megatron-LM, arXiv 1909.08053). KV is read from memory once; attention of prompts is arithmetic.
    """

    def __init__(self, hardware: Hardware, model: ModelShape, layers: Sequence[range], num_shards: int = 1) -> None:
        device = hardware.device
        self.link: Link = device.effective_link
        self.control_seconds = device.control_seconds
        self._model = model
        self._flops_per_second = device.bf16_flops_per_second * device.efficiency.compute * num_shards
        self._bytes_per_second = device.memory_bytes_per_second * device.efficiency.memory * num_shards
        # Devices beyond the KV heads hold copies of them.
        num_kv_shards = min(num_shards, model.num_kv_heads)
        self._kv_bytes_per_second = self._bytes_per_second / num_shards * num_kv_shards
        self.kv_links = self.link.kv_links(model.kv_bytes_per_token_layer, layers, num_kv_shards)
        self._layer_overhead_seconds = device.layer_overhead_seconds
        self._sum_seconds_per_token = 0.0
        if num_shards > 1:
            self._layer_overhead_seconds += 2 * device.link.latency_seconds
            self._sum_seconds_per_token = 2 * model.hidden_bytes_per_token / hardware.all_reduce_rate()
        self._kv_bytes_per_token_layer = model.kv_bytes_per_token_layer
        self._num_layers = [len(one) for one in layers]
        self._products = [_products_of(model, one) for one in layers]
        self.distinct_stages = distinct_stages([tuple(products) for products in self._products])
        self._head = _Product(1, model.head_flops, model.head_weight_bytes, 1.0)

    @classmethod
    def pipeline(cls, hardware: Hardware, model: ModelShape, num_stages: int | None = None) -> RooflineCost:
        """A stage a device (`num_stages` None: all devices), cut so that the slowest stage is fastest."""
        num_stages = hardware.num_devices if num_stages is None else num_stages
        return cls(
            hardware,
            model,
            split_layers(model.layer_weight_bytes, model.head_weight_bytes, 0.0, num_stages),
        )

    @classmethod
    def tensor_parallel(cls, hardware: Hardware, model: ModelShape) -> RooflineCost:
        """One stage of all devices. Raises JobError where the file has no all-reduce rate for their number."""
        return cls(hardware, model, [range(model.num_layers)], hardware.num_devices)

    @property
    def num_stages(self) -> int:
        return len(self._products)

    def stage_seconds(self, stage: int, work: StepWork) -> float:
        model, num_layers = self._model, self._num_layers[stage]
        seconds = sum(
            product.seconds(work.num_tokens, self._flops_per_second, self._bytes_per_second)
            for product in self._products[stage]
        )
        seconds += num_layers * (self._layer_overhead_seconds + self._sum_seconds_per_token * work.num_tokens)
        kv_bytes = num_layers * self._kv_bytes_per_token_layer * work.decode_context_tokens
        seconds += kv_bytes / self._kv_bytes_per_second
        # A query-key and a weight-value product, a multiplication and an addition each.
        pair_flops = 4 * model.num_heads * model.head_dim * num_layers
        seconds += pair_flops * work.prefill_pairs / self._flops_per_second
        if stage == self.num_stages - 1 and work.num_drawn:
            seconds += self._head.seconds(work.num_drawn, self._flops_per_second, self._bytes_per_second)
        return seconds

    def handoff_seconds(self, num_tokens: int) -> float:
        return self.link.handoff_seconds(num_tokens * self._model.hidden_bytes_per_token)


def _products_of(model: ModelShape, layers: range) -> list[_Product]:
    """A layer's products as one, layers alike together."""
    alike = Counter((model.layer_flops[layer], model.layer_weight_bytes[layer]) for layer in layers)
    return [
        # A dense layer does two operations with each of its numbers.
        _Product(count, flops, weight_bytes, min(1.0, flops / 2 * model.item_bytes / weight_bytes))
        for (flops, weight_bytes), count in alike.items()
    ]
