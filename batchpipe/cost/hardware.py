"""What a device can do, from a file of configs/hardware or of the user's: the numbers a roofline stands on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from batchpipe.cost.model import KvLink
from batchpipe.cost.profile_file import load_section
from batchpipe.errors import JobError
from batchpipe.job import values as v
from batchpipe.job.explain import shown
from batchpipe.job.shipped import shipped_files

_SEVERAL = re.compile(r"([1-9]\d*)x(.+)")

Rates = Annotated[
    dict[Annotated[int, Field(strict=True, ge=2)], Annotated[float, Field(strict=True, gt=0)]],
    v.Expects("a mapping of numbers of devices (integers >= 2) to bytes per second"),
]


class Link(v.Section):
    """Copies between memories, one direction at a time; both directions run side by side."""

    host_to_device_bytes_per_second: Annotated[v.Positive, Field(description="From host to device memory.")]
    device_to_host_bytes_per_second: Annotated[v.Positive, Field(description="From device to host memory.")]
    device_to_device_bytes_per_second: Annotated[v.Positive, Field(description="To the next stage's device.")]
    latency_seconds: Annotated[v.PositiveOrZero, Field(description="Of a hand-off, however small.")]

    def handoff_seconds(self, num_bytes: float) -> float:
        """From the end of one stage to the start of the next, for hidden states of this size."""
        return self.latency_seconds + num_bytes / self.device_to_device_bytes_per_second

    def kv_links(
        self, kv_bytes_per_token_layer: int, layers: Sequence[range], num_shards: int = 1
    ) -> tuple[KvLink, ...]:
        """Of stages that hold `layers` each, on `num_shards` devices with a link of its own each."""
        load = self.host_to_device_bytes_per_second * num_shards
        store = self.device_to_host_bytes_per_second * num_shards
        return tuple(KvLink(load, store, kv_bytes_per_token_layer, len(own)) for own in layers)


class Efficiency(v.Section):
    """What of the vendor's figures programs reach."""

    compute: Annotated[v.PositiveFraction, Field(description="Of bf16_flops_per_second.")]
    memory: Annotated[v.PositiveFraction, Field(description="Of memory_bytes_per_second.")]
    link: Annotated[v.PositiveFraction, Field(description="Of the link's rates.")]


class Device(v.Section):
    """One device, and what connects it to others of its kind."""

    name: Annotated[v.Name, Field(description="As the driver calls it.")]
    memory_bytes: Annotated[v.Size, Field(description="Memory of the device.")]
    memory_bytes_per_second: Annotated[v.Positive, Field(description="Nominal rate of its memory.")]
    bf16_flops_per_second: Annotated[v.Positive, Field(description="Nominal, dense, summed in float32.")]
    link: Link
    all_reduce_bytes_per_second: Annotated[
        Rates, Field(description="Bytes of the summed tensor by seconds, for each number of devices.")
    ]
    efficiency: Efficiency
    layer_overhead_seconds: Annotated[v.PositiveOrZero, Field(description="Of a layer, beside its work.")]
    control_seconds: Annotated[v.PositiveOrZero, Field(description="From a step's end to the next one's start.")]

    @property
    def effective_link(self) -> Link:
        """The link at the rates that programs reach."""
        share = self.efficiency.link
        return Link(
            host_to_device_bytes_per_second=self.link.host_to_device_bytes_per_second * share,
            device_to_host_bytes_per_second=self.link.device_to_host_bytes_per_second * share,
            device_to_device_bytes_per_second=self.link.device_to_device_bytes_per_second * share,
            latency_seconds=self.link.latency_seconds,
        )


@dataclass(frozen=True, slots=True)
class Hardware:
    """`num_devices` alike in one machine; `origin` is the file, for messages."""

    device: Device
    num_devices: int
    origin: str

    def all_reduce_rate(self) -> float:
        """Bytes per second over all devices. Raises JobError where the file does not know it."""
        rates = self.device.all_reduce_bytes_per_second
        if self.num_devices not in rates:
            raise JobError(
                f"{self.origin}: all_reduce_bytes_per_second: has no rate for {self.num_devices} devices "
                f"(only for {', '.join(map(str, sorted(rates))) or 'none'}); measure it and add it"
            )
        return rates[self.num_devices]


def known_hardware() -> dict[str, Path]:
    """The file of each device that comes with batchpipe, by name in order."""
    return shipped_files("hardware")


def load_hardware(name: str) -> Hardware:
    """`l20`, `4xl20`, or a file's path; where `<folder>/4xl20.yaml` is no file, it is four of `<folder>/l20.yaml`.

    Raises JobError naming the file, the key and what to do.
    """
    path = Path(name).expanduser()
    if path.suffix != ".yaml":
        known = known_hardware()
        count, device_name = _split(name)
        if device_name not in known:
            raise JobError(
                f"hardware: {shown(name)} is neither a file (*.yaml) nor one of {', '.join(known)}, "
                f"with the number of devices before it, as in 4x{next(iter(known), 'l20')}"
            )
        return Hardware(load_section(known[device_name], Device), count, str(known[device_name]))
    if path.is_file():
        return Hardware(load_section(path, Device), 1, str(path))
    count, stem = _split(path.stem)
    one = path.with_name(f"{stem}.yaml")
    if not one.is_file():
        raise JobError(f"hardware: {path} does not exist" + (f", nor does {one}" if one != path else ""))
    return Hardware(load_section(one, Device), count, str(one))


def _split(name: str) -> tuple[int, str]:
    several = _SEVERAL.fullmatch(name)
    return (int(several[1]), several[2]) if several else (1, name)
