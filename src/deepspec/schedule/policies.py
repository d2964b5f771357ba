"""Policies: how many of each row's proposals a round verifies (method.md 5).

A policy may decide on position k by everything that was known before token k was drawn: confidences up to k
of its own row (c_k is computed before the draw), all of other rows, all earlier rounds. It must not look at
token k or at anything computed from it, which c_{k+1} is: then the output is no longer the target's law.

R rows in flight, γ positions. confidences: [R, γ] in [0, 1], calibrated; survivals: their cumulative
products, the probability that all positions up to k are accepted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Lengths = NDArray[np.int64]
Rate = Callable[[Lengths], Floats]
"""Steps per second when so many tokens are verified in one pass, elementwise (SPS of method.md 5)."""
DELAY = 2
"""Rounds from the confidences that set a budget to the round that spends it: an engine that prepares rounds
ahead does not know the newest ones yet."""


class Load(NamedTuple):
    """rows in flight, and the mean number of tokens that the target holds for each of them."""

    rows: int
    context: float


class Policy(Protocol):
    """What the decoder asks in every round."""

    def proposes(self, load: Load) -> bool:
        """Asked before the draft runs: False makes this a plain round, in which the draft does no work."""
        return True

    def lengths(self, confidences: Floats, load: Load) -> Lengths:
        """[R] proposals to verify, each in 0…γ."""

    def learn(self, proposed: Lengths, accepted: Lengths) -> None:
        """Told after every round how many proposals of each row [R] were verified, and accepted."""
        return None


@dataclass(frozen=True)
class Fixed(Policy):
    """The same length for every row; 0 verifies no proposal."""

    length: int

    def proposes(self, load: Load) -> bool:
        return self.length > 0

    def lengths(self, confidences: Floats, load: Load) -> Lengths:
        rows, block = confidences.shape
        return np.full(rows, min(self.length, block))


@dataclass(frozen=True)
class Threshold(Policy):
    """Each row up to its first confidence below `least`: needs no step costs."""

    least: float

    def lengths(self, confidences: Floats, load: Load) -> Lengths:
        return np.logical_and.accumulate(confidences >= self.least, axis=1).sum(axis=1)


@dataclass(frozen=True)
class EarlyStop(Policy):
    """DSpark's Algorithm 1: admit tokens in the order of their survival while throughput rises, and stop at
    the first drop. Looking past a drop would decide on a token by what was drawn after it."""

    rate: Rate

    def lengths(self, confidences: Floats, load: Load) -> Lengths:
        survivals = confidences.cumprod(axis=1)
        order, throughput = ranked(survivals, self.rate)
        drops = np.flatnonzero(np.diff(throughput) <= 0)
        return admitted(survivals.shape, order, int(drops[0]) if len(drops) else len(order))


@dataclass
class Budget(Policy):
    """The number of tokens that would have been best `DELAY` rounds ago, spent on this round's likeliest.

    Step costs are staircases, so the best budget is sought globally; that is lossless only because the
    confidences which set it are older than every draw of this round.
    """

    rate: Rate
    earlier: deque[Floats] = field(default_factory=lambda: deque(maxlen=DELAY))

    def lengths(self, confidences: Floats, load: Load) -> Lengths:
        survivals = confidences.cumprod(axis=1)
        full = len(self.earlier) == DELAY
        share = best_share(self.earlier[0], self.rate) if full else 1.0
        self.earlier.append(survivals)
        order = np.argsort(-survivals, axis=None, kind="stable")
        return admitted(survivals.shape, order, round(share * survivals.size))


def policy_of(text: str) -> Policy | None:
    """The policy that a command line names: `all` (None), `none`, `fixed:K` or `threshold:C`.

    Raises ValueError for any other text.
    """
    name, _, value = text.partition(":")
    with suppress(ValueError):
        if text == "all":
            return None
        if text == "none":
            return Fixed(0)
        if name == "fixed" and int(value) >= 0:
            return Fixed(int(value))
        if name == "threshold" and 0 <= float(value) <= 1:
            return Threshold(float(value))
    raise ValueError(
        f"{text!r} is not a policy: write all, none, fixed:K (K proposals of each round) or threshold:C "
        "(each row up to its first confidence below C)"
    )


def ranked(survivals: Floats, rate: Rate) -> tuple[Lengths, Floats]:
    """(tokens by falling survival [R·γ], throughput [R·γ + 1] with the first 0, 1, … of them admitted).

    Throughput is expected tokens per second: every row commits one token, and each admitted one with its
    probability. Of equal survivals the earlier position comes first.
    """
    rows = len(survivals)
    order = np.argsort(-survivals, axis=None, kind="stable")
    committed = rows + np.concatenate([[0.0], survivals.ravel()[order].cumsum()])
    return order, committed * rate(rows + np.arange(len(committed)))


def best_share(survivals: Floats, rate: Rate) -> float:
    """The share of all proposals whose verification gives the most throughput."""
    _, throughput = ranked(survivals, rate)
    return int(throughput.argmax()) / survivals.size


def admitted(shape: tuple[int, ...], order: Lengths, count: int) -> Lengths:
    """[R] how many of each row are among the first `count` of `order`; they are its first positions, since
    survivals fall along a row."""
    return np.bincount(order[:count] // shape[1], minlength=shape[0])
