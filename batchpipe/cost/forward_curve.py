"""A cost model from the barest of profiles: the time of a whole forward pass by its number of tokens.

That is what TD-Pipe (arXiv 2506.10470) publishes, a CSV file `Total Length,Execute Time` in milliseconds. It has no
context length, so the reading of KV by decodes is added.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from batchpipe.cost.curve import Curve
from batchpipe.cost.hardware import Hardware
from batchpipe.cost.model import KvLink, StepWork
from batchpipe.cost.model_shape import ModelShape
from batchpipe.errors import JobError

HEADER = ["Total Length", "Execute Time"]


class ForwardCurveCost:
    """A `CostModel` of `num_stages` equal stages.

    Attention of prompts is within the curve, as whole prompts were measured.
    """

    def __init__(self, curve: Curve, hardware: Hardware, geometry: ModelShape, num_stages: int) -> None:
        device = hardware.device
        self.num_stages = num_stages
        self.link = device.effective_link
        self.control_seconds = device.control_seconds
        self.kv_links: Sequence[KvLink] = ()  # the profile is of whole models: nothing says what a stage's KV is
        self._curve = curve
        self._hidden_bytes_per_token = geometry.hidden_bytes_per_token
        self._seconds_per_context_token = geometry.kv_bytes_per_token / (
            device.memory_bytes_per_second * device.efficiency.memory
        )

    @classmethod
    def load(cls, path: Path, hardware: Hardware, geometry: ModelShape, num_stages: int) -> ForwardCurveCost:
        """Raises JobError where the file is not such a profile."""
        return cls(load_forward_curve(path), hardware, geometry, num_stages)

    def stage_seconds(self, stage: int, work: StepWork) -> float:
        whole = self._curve.at(work.num_tokens) + self._seconds_per_context_token * work.decode_context_tokens
        return whole / self.num_stages

    def handoff_seconds(self, num_tokens: int) -> float:
        num_bytes = num_tokens * self._hidden_bytes_per_token
        return self.link.latency_seconds + num_bytes / self.link.device_to_device_bytes_per_second


def load_forward_curve(path: Path) -> Curve:
    """Seconds of a forward pass by tokens. Raises JobError naming the line that is wrong."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise JobError(f"{path}: cannot be read: {error}") from None
    if not rows or rows[0] != HEADER:
        raise JobError(f"{path}, line 1: must be '{','.join(HEADER)}', the header of a profile of forward passes")
    points: list[tuple[float, float]] = []
    for number, row in enumerate(rows[1:], start=2):
        try:
            tokens, milliseconds = int(row[0]), float(row[1])
        except (ValueError, IndexError):
            raise JobError(f"{path}, line {number}: {','.join(row)!r} is not a number of tokens and a time") from None
        if tokens <= (points[-1][0] if points else 0) or not 0 < milliseconds < float("inf"):
            raise JobError(f"{path}, line {number}: tokens must increase from 1 and times be above 0")
        points.append((tokens, milliseconds / 1e3))
    if not points:
        raise JobError(f"{path}: holds no measurement below its header")
    return Curve.of(points)
