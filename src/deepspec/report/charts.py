"""Geometry of the report's charts, in units of the chart's viewBox; the template draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from deepspec.files import write_text
from deepspec.report.results import MISSING, estimate, is_number

WIDTH, HEIGHT = 360.0, 230.0
LEFT, RIGHT, TOP, BOTTOM = 40.0, 12.0, 12.0, 40.0
FRAME = {"width": WIDTH, "height": HEIGHT, "margins": {"left": LEFT, "right": RIGHT, "bottom": BOTTOM}}
"""What the template needs to draw around a chart."""
COLOURS = ("#222222", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
DASHES = ("none", "5 2", "1 2")
"""Of lines in a chart that stands alone: told apart without their colours, too."""
CURVE_POINTS = 120  # a training curve is averaged down to this many points


@dataclass(frozen=True)
class Style:
    """How one method looks wherever it appears: colour class, marker and dashes, never colour alone."""

    key: str
    label: str
    marker: str
    dashes: str
    hollow: bool


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) that cover low…high, at least two of them."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor * about >= span * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * k, 12) for k in range(first, max(last, first + 1) + 1)]


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[tuple[Style, Sequence[tuple[Any, Any]]]],
    y_range: tuple[float, float] | None = None,
    whole_x: bool = False,
    markers: bool = True,
) -> dict[str, Any] | None:
    """Geometry of a chart with one line per series; a point that is not a number leaves a gap.

    The result is None if there is nothing to draw. `y_range` fixes the vertical axis, `whole_x` puts a tick
    on every whole number.
    """
    points = [p for _, line in series for p in line if is_number(p[0]) and is_number(p[1])]
    if not points:
        return None
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_ticks = ticks(*(y_range or (min(y for _, y in points), max(y for _, y in points))))
    x_ticks = [float(k) for k in range(int(x_low), int(x_high) + 1)] if whole_x else ticks(x_low, x_high)
    x_low, x_high = (x_low - 0.3, x_high + 0.3) if whole_x else (x_ticks[0], x_ticks[-1])

    def across(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def up(y: float) -> float:
        share = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    drawn = []
    for style, line in series:
        path, pen = "", "M"
        marks = []
        for x, y in line:
            if is_number(x) and is_number(y):
                path, pen = f"{path}{pen}{across(x)} {up(y)} ", "L"
                marks.append((across(x), up(y)))
            else:
                pen = "M"
        if marks:
            drawn.append({"style": style, "path": path.strip(), "marks": marks if markers else marks[-1:]})
    return {
        "title": title,
        "x_label": x_label,
        "y_label": y_label,
        "x_ticks": [(across(x), f"{x:g}") for x in x_ticks],
        "y_ticks": [(up(y), f"{y:g}") for y in y_ticks],
        "lines": drawn,
    }


def bar_chart(
    title: str, groups: Sequence[tuple[str, Sequence[tuple[Style, Mapping[str, Any] | None]]]], unit: str
) -> dict[str, Any] | None:
    """Geometry of horizontal bars from 0, with interval whiskers and a line at 1; None if no method has a
    value.

    `groups` are (heading or "", [(style, estimate), …]); methods without a value are left out.
    """
    kept = [(head, [(s, e) for s, e in items if estimate(e)[0] != MISSING]) for head, items in groups]
    kept = [(head, items) for head, items in kept if items]
    values = [e.get(k) for _, items in kept for _, e in items if e for k in ("value", "high")]
    if not kept:
        return None
    x_ticks = ticks(0.0, max(1.0, *(value for value in values if is_number(value))))

    def across(x: float) -> float:
        return round(8 + max(0.0, x) / x_ticks[-1] * (WIDTH - 16), 1)

    y, heads, bars = 4.0, [], []
    for head, items in kept:
        if head:
            y += 16
            heads.append((y, head))
            y += 6
        for style, found in items:
            value, interval = estimate(found, unit)
            ends = {name: across(x) for name, x in (found or {}).items() if is_number(x)}
            whisker = (ends["low"], ends["high"]) if interval else None
            bar = {"y": y, "end": ends["value"], "whisker": whisker, "style": style}
            bars.append({**bar, "text": f"{value} {interval}".strip()})
            y += 36
        y += 4
    return {
        "title": title,
        "height": y + 24,
        "floor": y,
        "one": across(1.0),
        "zero": across(0.0),
        "x_ticks": [(across(x), f"{x:g}{unit}") for x in x_ticks],
        "heads": heads,
        "bars": bars,
    }


def averaged(points: Sequence[tuple[float, float]], count: int = CURVE_POINTS) -> list[tuple[float, float]]:
    """At most `count` points: the means of equally long runs of the given ones."""
    if len(points) <= count:
        return list(points)
    edges = [round(k * len(points) / count) for k in range(count + 1)]
    runs = [points[a:b] for a, b in pairwise(edges)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def write_lines(
    path: Path,
    title: str,
    x_label: str,
    y_label: str,
    at: Sequence[str],
    lines: Mapping[str, Sequence[float]],
) -> None:
    """Draw lines by name, evenly spaced over the labels `at`, as an SVG file that stands alone."""
    looks = {
        name: Style(COLOURS[i % len(COLOURS)], name, "", DASHES[i // len(COLOURS) % len(DASHES)], False)
        for i, name in enumerate(lines)
    }
    series = [(looks[name], list(enumerate(values))) for name, values in lines.items()]
    chart = line_chart(title, x_label, y_label, series, (0.0, max(max(v) for v in lines.values())), True)
    assert chart is not None, "there is nothing to draw"
    tall = HEIGHT + 14.0 * -(-len(lines) // 3) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 -18 {WIDTH:g} {tall + 18:g}" font-size="9" '
        'font-family="sans-serif"><rect y="-18" width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="-5" font-size="11">{escape(title)}, {escape(y_label)}</text>',
    ]
    for y, label in chart["y_ticks"]:
        parts.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{y + 3}" text-anchor="end">{label}</text>')
    for (x, _), label in zip(chart["x_ticks"], at, strict=True):
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{escape(label)}</text>')
    middle, below = (LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM + 27
    parts.append(f'<text x="{middle}" y="{below}" text-anchor="middle">{escape(x_label)}</text>')
    for i, line in enumerate(chart["lines"]):
        style, x, y = line["style"], 12 + 115 * (i % 3), HEIGHT + 14 * (i // 3)
        ink = f'stroke="{style.key}" stroke-dasharray="{style.dashes}" stroke-width="1.5" fill="none"'
        parts.append(f'<path d="{line["path"]}" {ink}/><path d="M{x} {y - 3}h14" {ink}/>')
        parts.append(f'<text x="{x + 18}" y="{y}">{escape(style.label)}</text>')
    write_text(path, "\n".join([*parts, "</svg>"]) + "\n")
