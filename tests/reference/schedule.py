"""Scheduling by plain loops: the oracle for `deepspec.schedule.policies`."""

from __future__ import annotations

import math
from collections.abc import Sequence


def by_survival(confidences: Sequence[Sequence[float]]) -> list[tuple[float, int, int]]:
    """(−survival, row, position) of all tokens, likeliest first; of equal ones the earlier."""
    return sorted(
        (-math.prod(row[: k + 1]), r, k) for r, row in enumerate(confidences) for k in range(len(row))
    )


def throughputs(confidences: Sequence[Sequence[float]], rates: Sequence[float]) -> list[float]:
    """Θ = τ · SPS(B) with the first 0, 1, … tokens admitted; rates[B - 1] is SPS(B)."""
    committed, found = float(len(confidences)), [len(confidences) * rates[len(confidences) - 1]]
    for n, (negative, _, _) in enumerate(by_survival(confidences), start=1):
        committed -= negative
        found.append(committed * rates[len(confidences) + n - 1])
    return found


def algorithm_1(confidences: Sequence[Sequence[float]], rates: Sequence[float]) -> list[int]:
    """Admit while Θ rises; stop at the first drop."""
    theta, lengths = throughputs(confidences, rates), [0] * len(confidences)
    for n, (_, row, _) in enumerate(by_survival(confidences), start=1):
        if theta[n] <= theta[n - 1]:
            break
        lengths[row] += 1
    return lengths


def best_budget(confidences: Sequence[Sequence[float]], rates: Sequence[float]) -> int:
    theta = throughputs(confidences, rates)
    return theta.index(max(theta))
