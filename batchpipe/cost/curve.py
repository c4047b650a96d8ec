"""Measured seconds as a function of one size: straight lines between neighbouring points, and no smoothing.

Kernels work in tiles, so time climbs in steps (at 129, 257, ... rows). Two neighbouring points keep a step's edge.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Curve:
    """sizes [P] increasing, seconds [P]. Before the first point its value holds, behind the last one its rate."""

    sizes: tuple[float, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.sizes) == len(self.seconds) > 0, "a curve has a point at least"
        assert all(a < b for a, b in zip(self.sizes, self.sizes[1:], strict=False)), "sizes must increase"

    @classmethod
    def of(cls, points: Iterable[tuple[float, float]]) -> Curve:
        sizes, seconds = zip(*points, strict=True)
        return cls(sizes, seconds)

    def at(self, size: float) -> float:
        right = bisect_left(self.sizes, size)
        if right == len(self.sizes):
            return self.seconds[-1] * size / self.sizes[-1] if self.sizes[-1] > 0 else self.seconds[-1]
        if right == 0 or self.sizes[right] == size:
            return self.seconds[right]
        left = right - 1
        share = (size - self.sizes[left]) / (self.sizes[right] - self.sizes[left])
        return self.seconds[left] + share * (self.seconds[right] - self.seconds[left])


@dataclass(frozen=True, slots=True)
class Surface:
    """Seconds as a function of two sizes: a curve over the second one at each of some values of the first."""

    sizes: tuple[float, ...]
    curves: tuple[Curve, ...]

    def at(self, first: float, second: float) -> float:
        right = bisect_left(self.sizes, first)
        if right == len(self.sizes):
            return self.curves[-1].at(second) * first / self.sizes[-1]
        if right == 0 or self.sizes[right] == first:
            return self.curves[right].at(second)
        left = right - 1
        share = (first - self.sizes[left]) / (self.sizes[right] - self.sizes[left])
        near, far = self.curves[left].at(second), self.curves[right].at(second)
        return near + share * (far - near)
