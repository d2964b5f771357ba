"""Calibration by plain loops in float64: the oracle for `deepspec.maths.calibration`."""

from __future__ import annotations

import math
from collections.abc import Sequence


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def expected_calibration_error(probabilities: Sequence[float], outcomes: Sequence[bool], bins: int) -> float:
    """Σ over bins of (samples in it / all samples) · |mean probability − share of outcomes|."""
    total = 0.0
    for b in range(bins):
        held = [
            (p, y)
            for p, y in zip(probabilities, outcomes, strict=True)
            if min(int(min(max(p, 1e-8), 1 - 1e-8) * bins), bins - 1) == b
        ]
        if held:
            mean = sum(min(max(p, 1e-8), 1 - 1e-8) for p, _ in held) / len(held)
            share = sum(y for _, y in held) / len(held)
            total += len(held) / len(probabilities) * abs(mean - share)
    return total


def area_under_the_curve(scores: Sequence[float], outcomes: Sequence[bool]) -> float | None:
    """The share of (happened, did not happen) pairs in the right order, ties counting half."""
    yes = [s for s, y in zip(scores, outcomes, strict=True) if y]
    no = [s for s, y in zip(scores, outcomes, strict=True) if not y]
    if not yes or not no:
        return None
    return sum((a > b) + 0.5 * (a == b) for a in yes for b in no) / (len(yes) * len(no))


def sequential_temperatures(
    logits: Sequence[Sequence[float]], accepted: Sequence[int], grid: Sequence[float], bins: int
) -> list[float]:
    """The temperature of each position with the least error of the survival, left to right."""
    survival, found = [1.0] * len(logits), []
    for k in range(len(logits[0])):
        outcomes = [count > k for count in accepted]
        tried = {t: [s * sigmoid(row[k] / t) for s, row in zip(survival, logits, strict=True)] for t in grid}
        best = min(grid, key=lambda t: expected_calibration_error(tried[t], outcomes, bins))
        found.append(best)
        survival = tried[best]
    return found
