"""How a model is cut into pipeline stages and copied: the layers of each stage, and the number of replicas."""

from __future__ import annotations

from dataclasses import dataclass

from batchpipe.errors import JobError
from batchpipe.job.spec import EngineSpec
from batchpipe.kv.layout import streams_per_block
from batchpipe.model.describe import ModelInfo
from batchpipe.model.partition import split_layers
from batchpipe.placement.machine import Machine

# A layer does more than the products its cost counts (attention, norms), and the head less: it only sees tokens after
# which one is sampled. Measured on chat prompts; this only moves the cuts between stages.
LAYER_OVERHEAD = 1.3
HEAD_SHARE = 0.6


@dataclass(frozen=True, slots=True)
class StageSplit:
    """The layers of each stage of one replica, and the number of replicas, all on devices of one kind."""

    device: str  # cpu or cuda
    layers: tuple[range, ...]
    num_replicas: int = 1

    @property
    def num_stages(self) -> int:
        return len(self.layers)

    @property
    def num_pools(self) -> int:
        """Stages of all replicas; each one has a KV pool on its device and one in host memory."""
        return self.num_stages * self.num_replicas

    @property
    def streams_per_block(self) -> int:
        """As in `Capacity`: the stage with the fewest layers decides."""
        return streams_per_block(min(map(len, self.layers)))


def split_stages(machine: Machine, engine: EngineSpec, info: ModelInfo) -> StageSplit:
    """Resolves `engine.num_stages` and `engine.replicas`. Raises JobError where the machine has too few GPUs.

    auto: on GPUs the fewest stages that hold the weights and as much KV again, and replicas on all GPUs that are left;
    on the CPU one of each, since every replica reads all weights again for fewer sequences.
    """
    num_gpus = machine.num_gpus
    if num_gpus is None:
        num_stages = 1 if engine.num_stages == "auto" else engine.num_stages
        num_replicas = 1 if engine.replicas == "auto" else engine.replicas
        return StageSplit("cpu", stage_layers(info, num_stages), num_replicas)
    if engine.num_stages == "auto":
        num_stages = fewest_stages(info.weight_bytes, machine.free_bytes, num_gpus)
    else:
        num_stages = engine.num_stages
    num_replicas = max(1, num_gpus // num_stages) if engine.replicas == "auto" else engine.replicas
    if num_stages * num_replicas > num_gpus:
        raise JobError(
            f"engine.num_stages is {num_stages} with {num_replicas} replicas and {machine.name} has {num_gpus} GPUs; "
            "every stage of every replica needs one of its own: lower engine.num_stages or engine.replicas"
        )
    return StageSplit("cuda", stage_layers(info, num_stages), num_replicas)


def fewest_stages(weight_bytes: int, free_device_bytes: int, num_gpus: int) -> int:
    """The smallest divisor of the number of GPUs whose stages keep half of their memory for KV; else all of them."""
    for num_stages in range(1, num_gpus):
        if num_gpus % num_stages == 0 and 2 * weight_bytes <= num_stages * free_device_bytes:
            return num_stages
    return num_gpus


def stage_layers(info: ModelInfo, num_stages: int) -> tuple[range, ...]:
    """The layers of each stage, cut so that the slowest stage is as fast as possible."""
    layer_costs = [cost * LAYER_OVERHEAD for cost in info.layer_flops]
    return tuple(split_layers(layer_costs, info.head_flops * HEAD_SHARE, 0.0, num_stages))


def stage_weight_bytes(info: ModelInfo, layers: tuple[range, ...]) -> tuple[int, ...]:
    """Weights of each stage. Half of what is outside the layers counts to the first, the embedding, half to the last,
    the head."""
    weight_bytes = [sum(info.layer_weight_bytes[layer] for layer in own) for own in layers]
    weight_bytes[0] += info.other_weight_bytes // 2
    weight_bytes[-1] += info.other_weight_bytes - info.other_weight_bytes // 2
    return tuple(weight_bytes)
