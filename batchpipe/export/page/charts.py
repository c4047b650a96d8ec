"""Charts as SVG text: lines over time, bars of a histogram, a grid of counts. The page's style has their colours."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

_WIDTH, _HEIGHT = 640.0, 190.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 12.0, 12.0, 26.0
_NUM_TICKS = 4

Line = tuple[str, Sequence[float]]  # its name, and its values


def short(number: float) -> str:
    """1,234,567 as 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def line_chart(title: str, times: Sequence[float], lines: Sequence[Line], *, unit: str, top: float = 0.0) -> str:
    """Lines over seconds. top: the axis reaches to this at least."""
    largest = max([top, *(max(values, default=0.0) for _, values in lines)]) or 1.0
    longest = max(times, default=0.0) or 1.0
    body = [_axes(largest, longest, unit)]
    for number, (name, values) in enumerate(lines):
        points = " ".join(
            f"{_x(time / longest):.1f},{_y(value / largest):.1f}" for time, value in zip(times, values, strict=True)
        )
        body.append(f'<polyline class="line c{number}" points="{points}"><title>{escape(name)}</title></polyline>')
    return _figure(title, body, [name for name, _ in lines])


def bar_chart(title: str, edges: NDArray[np.int64], counts: Sequence[NDArray[np.int64]], names: Sequence[str]) -> str:
    """Histograms over the same edges, from the first to the last bin that holds anything."""
    used = np.flatnonzero(np.sum(counts, axis=0))
    if not len(used):
        return ""
    first, end = int(used[0]), int(used[-1]) + 1
    largest = float(max(count.max() for count in counts))
    width = 1.0 / (end - first)
    body = [_grid(largest, "completions")]
    for number, count in enumerate(counts):
        for index in range(first, end):
            if not count[index]:
                continue
            upper = int(edges[index + 1]) - 1 if index + 1 < len(edges) else None
            reach = f"{edges[index]:,}" + ("" if upper == edges[index] else f" to {upper:,}" if upper else " and more")
            left = _x((index - first + number / len(counts)) * width)
            height = (_HEIGHT - _TOP - _BOTTOM) * count[index] / largest
            size = (_WIDTH - _LEFT - _RIGHT) * width / len(counts)
            body.append(
                f'<rect class="c{number}" x="{left:.1f}" y="{_y(count[index] / largest):.1f}" '
                f'width="{max(size - 0.8, 0.6):.1f}" height="{height:.1f}">'
                f"<title>{escape(names[number])}, {reach} tokens: {count[index]:,}</title></rect>"
            )
    for index in range(first, end, max(1, (end - first) // 8)):
        body.append(_label(_x((index - first) * width), _HEIGHT - 8, f"{edges[index]:,}"))
    return _figure(title, body, names)


def grid_chart(title: str, edges: NDArray[np.int64], counts: NDArray[np.int64], across: str, up: str) -> str:
    """counts [across, up]: darker where there are more; what lies on the line was foreseen."""
    used = np.flatnonzero(counts.sum(0) + counts.sum(1))
    if not len(used):
        return ""
    first, end = int(used[0]), int(used[-1]) + 1
    number, size = end - first, 300.0
    cell = size / number
    largest = np.log1p(counts.max())
    body = [f'<line class="grid" x1="{_LEFT}" y1="{size}" x2="{_LEFT + size}" y2="0"/>']
    for i, j in zip(*np.nonzero(counts[first:end, first:end]), strict=True):
        count = int(counts[first + i, first + j])
        body.append(
            f'<rect class="c0" x="{_LEFT + i * cell:.1f}" y="{size - (j + 1) * cell:.1f}" width="{cell:.1f}" '
            f'height="{cell:.1f}" opacity="{0.15 + 0.85 * np.log1p(count) / largest:.2f}"><title>{escape(across)} '
            f"{edges[first + i]:,}, {escape(up)} {edges[first + j]:,}: {count:,}</title></rect>"
        )
    for index in range(0, number, max(1, number // 5)):
        body.append(_label(_LEFT + index * cell, size + 14, f"{edges[first + index]:,}"))
        body.append(_label(_LEFT - 6, size - index * cell, f"{edges[first + index]:,}", anchor="end"))
    body.append(_label(_LEFT + size / 2, size + 30, across, anchor="middle"))
    return _figure(title, body, [], f"0 -6 {_LEFT + size + 10:.0f} {size + 42:.0f}")


def _axes(largest: float, longest: float, unit: str) -> str:
    labels = [_grid(largest, unit)]
    for tick in range(_NUM_TICKS + 1):
        share = tick / _NUM_TICKS
        anchor = "end" if tick == _NUM_TICKS else "middle"
        labels.append(_label(_x(share), _HEIGHT - 8, _duration(longest * share), anchor))
    return "".join(labels)


def _grid(largest: float, unit: str) -> str:
    lines = []
    for tick in range(_NUM_TICKS + 1):
        y = _y(tick / _NUM_TICKS)
        lines.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        lines.append(_label(_LEFT - 6, y + 4, short(largest * tick / _NUM_TICKS), anchor="end"))
    return "".join(lines) + f"<title>{escape(unit)}</title>"


def _figure(title: str, body: Sequence[str], names: Sequence[str], box: str = f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}") -> str:
    legend = "".join(f'<span><i class="c{i}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return (
        f'<figure><figcaption>{escape(title)}<span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="{box}" role="img" aria-label="{escape(title)}">{"".join(body)}</svg></figure>'
    )


def _label(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _x(share: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * share


def _y(share: float) -> float:
    return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share


def _duration(seconds: float) -> str:
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.0f} s"
