"""A device measured with one model: the file that `batchpipe profile` writes.

A profile is one YAML file. Times are medians in seconds; tables are lists of [size, seconds] with neighbouring points
kept where kernels step, so nothing is smoothed away.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import AfterValidator, Field, Strict

from batchpipe.cost.hardware import Link
from batchpipe.cost.model_shape import ModelShape
from batchpipe.cost.profile_file import load_section
from batchpipe.errors import JobError
from batchpipe.job import values as v
from batchpipe.job.cache_folder import cache_folder


def _increasing(points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    if not points or any(a[0] >= b[0] for a, b in zip(points, points[1:], strict=False)):
        raise ValueError("sizes do not increase")
    return points


_Number = Annotated[float, Strict(), Field(ge=0)]
_Points = Annotated[tuple[tuple[_Number, _Number], ...], AfterValidator(_increasing)]
Table = Annotated[_Points, v.Expects("a nonempty list of [size, seconds] with increasing sizes")]
Tables = Annotated[
    dict[Annotated[int, Strict(), Field(ge=1)], _Points],
    Field(min_length=1),
    v.Expects("a nonempty mapping of numbers of sequences to lists of [context tokens, seconds]"),
]
Coefficient = Annotated[float, Strict(), v.Expects("a finite number")]


class ProfiledModel(v.Section):
    """The model that was measured: its name, and what times depend on."""

    name: Annotated[v.Name, Field(description="As the job calls it.")]
    dtype: Annotated[v.Name, Field(description="Type it computes in: bfloat16, float16 or float32.")]
    num_layers: v.Count
    num_heads: v.Count
    num_kv_heads: v.Count
    head_dim: v.Count
    hidden_size: v.Count
    vocabulary_size: v.Count


class ProfiledFit(v.Section):
    """Decode steps as alpha * sequences + beta * context tokens + delta, in seconds; errors are relative."""

    alpha: Coefficient
    beta: Coefficient
    delta: Coefficient
    median_error: v.PositiveOrZero
    worst_error: v.PositiveOrZero


class ProfiledError(v.Section):
    """How far steps that are in no table were from what the tables say of them."""

    num_steps: v.Count
    median_error: v.PositiveOrZero
    worst_error: v.PositiveOrZero


class StepTimes(v.Section):
    """The parts of a step's time. Attention is what a layer takes beyond its products."""

    step_seconds: Annotated[Table, Field(description="By new tokens: a stage's time beside its layers and the head.")]
    layer_seconds: Annotated[Table, Field(description="By new tokens: one layer.")]
    head_seconds: Annotated[Table, Field(description="By drawn tokens: last norm and head.")]
    decode_attention_seconds: Annotated[Tables, Field(description="By sequences, then context of each: one layer.")]
    prefill_attention_seconds: Annotated[Table, Field(description="By (new, read) pairs of tokens: one layer.")]
    greedy_row_seconds: Annotated[v.PositiveOrZero, Field(description="Choosing the most likely token, a row.")]
    random_row_seconds: Annotated[v.PositiveOrZero, Field(description="Drawing a token with top_p, a row.")]


class Profile(v.Section):
    """What `batchpipe profile` measures."""

    version: Annotated[v.One, Field(description="Version of this format.")]
    device: Annotated[v.Name, Field(description="The device, with its threads where it is a processor.")]
    measured_on: Annotated[v.Name, Field(description="Date, YYYY-MM-DD.")]
    model: ProfiledModel
    times: StepTimes
    link: Link
    control_seconds: Annotated[v.PositiveOrZero, Field(description="A message to another process and back.")]
    decode_fit: ProfiledFit
    held_out: ProfiledError

    def check_fits(self, origin: str, model: ModelShape, device: str) -> None:
        """Raises JobError, naming what differs, where this profile is not of that model, its dtype and this device.

        A model's name may differ: its numbers are what times depend on.
        """
        if self.device != device:
            raise JobError(f"{origin}: device: was measured on {self.device!r} and this is {device!r}; {_REMEDY}")
        if self.model.dtype != model.dtype:
            raise JobError(
                f"{origin}: model.dtype: was measured in {self.model.dtype} and runs in {model.dtype}; {_REMEDY}"
            )
        for key in ("num_layers", "num_heads", "num_kv_heads", "head_dim", "hidden_size", "vocabulary_size"):
            measured, wanted = getattr(self.model, key), getattr(model, key)
            if measured != wanted:
                raise JobError(
                    f"{origin}: model.{key}: was measured with {self.model.name}, which has {measured}, "
                    f"and {model.name} has {wanted}; {_REMEDY}"
                )


_REMEDY = "run `batchpipe profile` with this model on this machine"


def load_profile(path: Path) -> Profile:
    """Raises JobError with a line for each wrong key."""
    return load_section(path, Profile)


def save_profile(profile: Profile, path: Path) -> None:
    """Written aside and renamed, so that a reader finds a whole profile. Raises JobError where the folder refuses."""
    text = yaml.safe_dump(profile.model_dump(), sort_keys=False, default_flow_style=None, width=110)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise JobError(f"{path}: cannot be written: {error.strerror}; give another place with --output") from None


def profile_path(model_name: str, device: str, dtype: str) -> Path:
    """Where a profile of this machine's user is kept."""
    name = "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", part).strip("_") for part in (model_name, device, dtype))
    return cache_folder() / "profiles" / f"{name}.yaml"


def find_profile(model_name: str, device: str, dtype: str) -> Profile | None:
    """The profile that `batchpipe profile` kept, or None. Raises JobError where it is damaged."""
    path = profile_path(model_name, device, dtype)
    return load_profile(path) if path.is_file() else None
