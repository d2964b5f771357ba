"""A table of step costs read point by point, in plain Python numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def along(axis: Sequence[float], values: Sequence[float], x: float) -> float:
    """A line through points: level below the first, extended beyond the last."""
    if len(axis) == 1 or x <= axis[0]:
        return float(values[0])
    upper = next((i for i in range(1, len(axis)) if x < axis[i]), len(axis) - 1)
    low, high = axis[upper - 1], axis[upper]
    return float(values[upper - 1] + (values[upper] - values[upper - 1]) * (x - low) / (high - low))


def looked_up(axes: Sequence[Sequence[float]], table: Any, point: Sequence[float]) -> float:
    """One axis after another, the last first."""
    if len(axes) == 1:
        return along(axes[0], table, point[0])
    return along(axes[0], [looked_up(axes[1:], part, point[1:]) for part in table], point[0])
