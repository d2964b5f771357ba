"""Policies: how many of each row's proposals a round verifies (method.md 5).

A policy may decide on position k by everything that was known before token k was drawn: confidences up to k
of its own row (c_k is computed before the draw), all of other rows, all earlier rounds. It must not look at
token k or at anything computed from it, which c_{k+1} is: then the output is no longer the target's law.

R rows in flight, γ positions. confidences: [R, γ] in [0, 1], calibrated; survivals: their cumulative
products, the probability that all positions up to k are accepted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Lengths = NDArray[np.int64]
DELAY = 2
"""Rounds from the confidences that set a budget to the round that spends it: an engine that prepares rounds
ahead does not know the newest ones yet."""


class Load(NamedTuple):
    """rows in flight, the mean number of tokens that the target holds for each of them, and how many of the
    rows are in their first round."""

    rows: int
    context: float
    fresh: int = 0


class RoundSeconds(NamedTuple):
    """What a round takes at one load. plain: without proposals. drafted [n + 1]: with proposals, of which 0,
    1, …, n of all rows together are verified; 1 / drafted is SPS of method.md 5. observe: what the draft
    needs for rows of which it has seen nothing yet. ragged: `StepCosts.ragged`."""

    plain: float
    drafted: Floats
    observe: float = 0.0
    ragged: float = 0.0


Seconds = Callable[[Load, int], RoundSeconds]
"""(load, n) -> what a round takes with up to n proposals (`StepCosts.rounds`)."""


class Policy(Protocol):
    """What the decoder asks in every round."""

    def proposes(self, load: Load) -> bool:
        """Asked before the draft runs: False makes this a plain round, in which the draft does no work."""
        return True

    def lengths(self, confidences: Floats, load: Load) -> Lengths:
        """[R] proposals to verify, each in 0…γ."""

    def learn(self, proposed: Lengths, gained: Lengths) -> None:
        """Told after every round how many proposals of each row [R] were verified, and how many tokens more
        than one were kept: those accepted, unless the answer ended among them."""
        return None


class Scheduled(NamedTuple):
    """What a decoder is told of scheduling. policy: None verifies everything. temperatures: [γ], of the
    confidences."""

    policy: Policy | None = None
    temperatures: Sequence[float] | None = None


@dataclass(frozen=True)
class Fixed(Policy):
    """The same length for every row; 0 verifies no proposal."""

    length: int

    def proposes(self, load: Load) -> bool:
        return self.length > 0

    def lengths(self, confidences: Floats, load: Load) -> Lengths:
        rows, block = confidences.shape
        return np.full(rows, min(self.length, block))


NONE = Fixed(0)
"""Plain decoding."""


@dataclass(frozen=True)
class Threshold(Policy):
    """Each row up to its first confidence below `least`: needs no step costs."""

    least: float

    def lengths(self, confidences: Floats, load: Load) -> Lengths:
        return counted(np.logical_and.accumulate(confidences >= self.least, axis=1))


@dataclass(frozen=True)
class EarlyStop(Policy):
    """DSpark's Algorithm 1: admit tokens in the order of their survival while throughput rises, and stop at
    the first drop. Looking past a drop would decide on a token by what was drawn after it."""

    seconds: Seconds

    def lengths(self, confidences: Floats, load: Load) -> Lengths:
        survivals = confidences.cumprod(axis=1)
        ordered, throughput = ranked(survivals, self.seconds(load, survivals.size).drafted)
        drops = throughput[1:] <= throughput[:-1]
        first = int(drops.argmax()) if len(drops) else 0
        return admitted(survivals, ordered, first if len(drops) and drops[first] else len(ordered))


@dataclass
class Budget(Policy):
    """The number of tokens that would have been best `DELAY` rounds ago, spent on this round's likeliest.

    Step costs are staircases, so the best budget is sought globally; that is lossless only because the
    confidences which set it are older than every draw of this round.
    """

    seconds: Seconds
    shares: deque[float] = field(default_factory=lambda: deque([1.0] * DELAY))
    """Best shares of the last rounds, the oldest first."""

    def lengths(self, confidences: Floats, load: Load) -> Lengths:
        survivals = confidences.cumprod(axis=1)
        ordered, throughput = ranked(survivals, self.seconds(load, survivals.size).drafted)
        self.shares.append(int(throughput.argmax()) / survivals.size)
        return admitted(survivals, ordered, round(self.shares.popleft() * survivals.size))


def ranked(survivals: Floats, seconds: Floats) -> tuple[Floats, Floats]:
    """(survivals [R·γ], the largest first, throughput [R·γ + 1] with the first 0, 1, … of them admitted).

    Throughput is expected tokens per second: every row commits one token, and each admitted one with its
    probability. seconds: [R·γ + 1].
    """
    ordered = np.sort(survivals, axis=None)[::-1]
    committed = np.empty(len(ordered) + 1)
    committed[0] = 0.0
    np.add.accumulate(ordered, out=committed[1:])
    committed += len(survivals)
    return ordered, committed / seconds


def best_share(survivals: Floats, seconds: Floats) -> float:
    """The share of all proposals whose verification gives the most throughput."""
    return int(ranked(survivals, seconds)[1].argmax()) / survivals.size


def admitted(survivals: Floats, ordered: Floats, count: int) -> Lengths:
    """[R] how many of each row are among the `count` likeliest, of equal ones the first in the order of rows.
    They are its first positions, since survivals fall along a row."""
    if count in (0, len(ordered)):
        return np.full(len(survivals), count and survivals.shape[1])
    price = ordered[count - 1]
    if ordered[count] < price:
        return counted(survivals >= price)
    chosen = survivals > price
    equal = np.flatnonzero(survivals == price)
    chosen.flat[equal[: count - np.count_nonzero(chosen)]] = True
    return counted(chosen)


def counted(chosen: NDArray[np.bool_]) -> Lengths:
    """[R] how many of each row [R, γ]; as a product, which is quicker than a sum along short rows."""
    return np.dot(chosen, np.ones(chosen.shape[1], np.int64))
