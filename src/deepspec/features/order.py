"""Which rows share a training batch. No torch: the planner counts the padding with it."""

from __future__ import annotations

from collections.abc import Sequence

WINDOW = 8
"""Batches whose rows are sorted by length among themselves."""


def batches_by_length(shuffled: Sequence[int], lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """The shuffled row numbers in batches: sorted by length inside each window of eight batches, so that
    little is padding while batches stay random."""
    batches = []
    for start in range(0, len(shuffled), WINDOW * batch_size):
        window = sorted(shuffled[start : start + WINDOW * batch_size], key=lambda i: lengths[i])
        batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    return batches
