"""Measures the device of a stage with one model, in the time it is given."""

from __future__ import annotations

from datetime import date
from time import perf_counter

import torch

from batchpipe.cost.hardware import Link
from batchpipe.cost.profile import Profile, ProfiledModel
from batchpipe.model.describe import ModelInfo
from batchpipe.pipeline.memory import free_bytes
from batchpipe.pipeline.stage import StageSpec
from batchpipe.profiling.handoff import measure_handoff
from batchpipe.profiling.stage_time import TimedStage, copy_rates, row_seconds
from batchpipe.profiling.tables import (
    DECODES,
    HELD_OUT,
    PROMPTS,
    SHORT_PROMPTS,
    UNDRAWN,
    Timings,
    decode_fit,
    held_out_error,
    step_times,
)

_ONE_LAYER_SHARE = 0.15  # of the time, for steps of a single layer
_NUM_ROUNDS = 5  # that should fit in the rest; of a large model fewer layers are measured
_WEIGHT_SHARE = 0.5  # of free memory, for the weights of the layers measured


def measure(info: ModelInfo, spec: StageSpec, seconds: float) -> Profile:
    """Profiles the device of `spec`, in about `seconds`."""
    ending = perf_counter() + seconds
    handoff = measure_handoff(info.hidden_size, getattr(torch, info.dtype))
    greedy_row_seconds, random_row_seconds = row_seconds(spec)
    one_layer = TimedStage(spec, 1)
    device_name, bytes_per_block = one_layer.device_name, one_layer.bytes_per_block * info.num_layers
    one_layer_seconds = one_layer.step_seconds(SHORT_PROMPTS, _ONE_LAYER_SHARE * seconds)
    del one_layer
    to_device, to_host = copy_rates(spec.device, bytes_per_block)
    num_layers = _num_layers(info, spec.device, sum(one_layer_seconds.values()), ending - perf_counter())
    shapes = (*SHORT_PROMPTS, *UNDRAWN, *DECODES, *PROMPTS, *HELD_OUT)
    fitting = [shape for shape in shapes if shape.longest_tokens <= info.max_context_tokens]
    stage = TimedStage(spec, num_layers)
    timings = Timings(
        one_layer_seconds=one_layer_seconds,
        num_layers=num_layers,
        seconds=stage.step_seconds(fitting, ending - perf_counter()),
        greedy_row_seconds=greedy_row_seconds,
        random_row_seconds=random_row_seconds,
    )
    times = step_times(timings)
    return Profile(
        version=1,
        device=device_name,
        measured_on=date.today().isoformat(),
        model=ProfiledModel(
            name=info.name,
            dtype=info.dtype,
            num_layers=info.num_layers,
            num_heads=info.num_heads,
            num_kv_heads=info.num_kv_heads,
            head_dim=info.head_dim,
            hidden_size=info.hidden_size,
            vocabulary_size=info.vocabulary_size,
        ),
        times=times,
        link=Link(
            host_to_device_bytes_per_second=to_device,
            device_to_host_bytes_per_second=to_host,
            device_to_device_bytes_per_second=handoff.bytes_per_second,
            latency_seconds=handoff.latency_seconds,
        ),
        control_seconds=2 * handoff.latency_seconds,
        decode_fit=decode_fit(timings),
        held_out=held_out_error(times, timings),
    )


def _num_layers(info: ModelInfo, device: str, round_seconds: float, seconds: float) -> int:
    """As many as memory holds and the time allows `_NUM_ROUNDS` rounds of; two at least, to tell a layer from the rest.

    round_seconds: of all steps of short prompts with one layer, about a third of what a layer adds to a round.
    """
    in_time = int(seconds / (_NUM_ROUNDS * 3 * round_seconds))
    in_memory = int(_WEIGHT_SHARE * free_bytes(device) / max(info.layer_weight_bytes))
    return min(info.num_layers, max(2, min(in_time, in_memory)))
