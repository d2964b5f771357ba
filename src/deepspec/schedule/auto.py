"""A policy that is not to lose against the best fixed length, no speculation included, at any load.

Before a round it compares the throughputs that all its choices promise: the step costs of this machine, and
how often proposals as likely as these were accepted. All it decides by comes from earlier rounds, apart from
the confidences that are compared with a price, each with its own position's: so it changes no law.

R rows in flight, γ positions, N rows of some rounds, B bins of survival.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from deepspec.schedule.policies import Floats, Lengths, Load, Policy, Seconds, counted

BINS = 32
MEMORY = 4000.0
"""Rows after which what was proposed counts 1/e."""
CELL_MEMORY = 200.0
"""Outcomes that count per position and bin: of more, the older ones weigh less."""
PRIOR = 8.0
"""Outcomes that the draft's own claim counts for."""
WARM_UP = 256
"""Rows of which everything is verified before anything is decided: ten answers. A few would be alike."""
HOPE = 2.0
"""Speculation may be better than it was, by this over the root of the rows seen (the rounds of an answer are
alike). A choice against it has to be surer, since it brings no evidence to the contrary."""
EXPLORING, LEAST = 0.005, 0.02
"""The share of the time that may be lost by verifying more than pays, to notice that a draft has improved;
and the least share of such a round that counts as lost."""
ANSWERS, TOKENS = (10.0, 1000.0), 20_000.0
"""Answers and their tokens that stand for what comes at first, and the tokens that are remembered."""
ROUNDS, CONTEXT = 16, 32
"""A choice is made again after so many rounds, and once there are other rows or so many more tokens."""


class Choice(NamedTuple):
    """Verified are each row's first `most` proposals of a survival of at least `price`. seconds: of such a
    round; exploring: those that are lost in one that verifies everything."""

    most: int
    price: float
    seconds: float
    exploring: float


class Auto(Policy):
    """Takes the choice of the most expected tokens per second: no proposals, any fixed length, or each row
    down to a survival at which another token still pays."""

    def __init__(self, seconds: Seconds, block: int) -> None:
        self.seconds, self.block = seconds, block
        shape = (block, BINS)
        self.seen, self.verified, self.survived = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        """Rows by position and survival: proposed, verified, and gained up to there."""
        self.claimed = np.broadcast_to((np.arange(BINS) + 0.5) / BINS, shape)
        self.rows = 0
        self.answers, self.tokens = ANSWERS
        self.unread: list[tuple[Floats, Lengths, Lengths]] = []
        """Survivals, proposals verified and tokens gained in rounds that are not in the table yet."""
        self.survivals: Floats | None = None
        self.choice = Choice(block, 0.0, 0.0, 0.0)
        self.load: tuple[int, int] | None = None
        self.age, self.credit, self.plain, self.exploring = 0, 0.0, False, True

    def proposes(self, load: Load) -> bool:
        now = (load.rows, int(load.context) // CONTEXT)
        if now != self.load or self.age >= ROUNDS:
            self.load, self.age = now, 0
            self._read()
            self.choice = self._best(load)
        self.age += 1
        self.answers += load.fresh
        price = self.choice.exploring
        # What is saved for one look and no more: a change of load is not to bring many at once.
        self.credit = min(self.credit + EXPLORING * self.choice.seconds, price)
        self.exploring = self.credit >= price or self.rows < WARM_UP
        if self.exploring:
            self.credit = 0.0
        self.plain = not self.exploring and self.choice.most == 0
        return not self.plain

    def lengths(self, confidences: Floats, load: Load) -> Lengths:
        self.survivals = confidences.cumprod(axis=1)
        if self.exploring:
            return np.full(len(confidences), self.block)
        return counted(self.survivals[:, : self.choice.most] >= self.choice.price)

    def learn(self, proposed: Lengths, gained: Lengths) -> None:
        self.tokens += len(gained) + int(gained.sum())
        if self.survivals is not None:
            self.rows += len(proposed)
            self.unread.append((self.survivals, proposed, gained))
            self.survivals = None

    def _read(self) -> None:
        """Bring the rounds since the last time into the table.

        Only verified positions tell of survival, and which these are depends on nothing but their bins and
        positions: so the shares are not biased.
        """
        if not self.unread:
            return
        survivals, proposed, gained = (np.concatenate(part) for part in zip(*self.unread, strict=True))
        self.unread = []
        survivals = np.nan_to_num(survivals)  # of a draft whose row the decoder has dropped
        places = np.arange(self.block)
        cells = np.minimum((survivals * BINS).astype(np.int64), BINS - 1) + BINS * places
        known, held = places < proposed[:, None], places < gained[:, None]
        self.seen *= np.exp(-len(survivals) / MEMORY)
        for table, chosen in (
            (self.seen, cells),
            (self.verified, cells[known]),
            (self.survived, cells[held]),
        ):
            table += np.bincount(chosen.ravel(), minlength=table.size).reshape(table.shape)
        kept = CELL_MEMORY / np.maximum(self.verified, CELL_MEMORY)
        self.verified *= kept
        self.survived *= kept

    def _best(self, load: Load) -> Choice:
        """The choice of the most expected tokens per second."""
        plain, drafted, observe, ragged = self.seconds(load, load.rows * self.block)
        if self.tokens > TOKENS:
            self.answers, self.tokens = self.answers / 2, self.tokens / 2
        rows = float(self.seen[0].sum())
        if not rows:
            return Choice(self.block, 0.0, float(drafted[-1]), 0.0)
        rates = (self.survived + PRIOR * self.claimed) / (self.verified + PRIOR)
        share = self.seen / rows
        gain = share * rates
        # The fixed lengths 1…γ, then a price at each bin's lower edge.
        tokens = np.concatenate([np.arange(1.0, self.block + 1), share.sum(0)[::-1].cumsum()[::-1]])
        gains = np.concatenate([gain.sum(1).cumsum(), gain.sum(0)[::-1].cumsum()[::-1]])
        # Of some rows, one is nearly always the longest; a pass over uneven rows takes longer.
        reached = share[:, ::-1].cumsum(1)[:, ::-1]
        longest = (1.0 - (1.0 - reached.clip(0.0, 1.0)) ** load.rows).sum(0)
        widest = np.concatenate([tokens[: self.block], longest])
        even, full_width = np.interp(load.rows * np.array([tokens, widest]), np.arange(len(drafted)), drafted)
        seconds = even + ragged * (full_width - even)
        # Speculation also takes the draft's reading of each prompt.
        seconds += observe * (1.0 + gains) * self.answers / self.tokens
        throughput = (1.0 + gains) / seconds
        best, full = int(throughput.argmax()), float(drafted[-1])
        most = max(float(throughput[best]), 1.0 / plain)
        lost = full * max(1.0 - float(throughput[self.block - 1]) / most, LEAST)
        hope = 1.0 + HOPE / max(self.rows, WARM_UP) ** 0.5
        if throughput[best] * hope <= 1.0 / plain:
            return Choice(0, 0.0, plain, lost + (observe if self.plain else 0.0))
        price = max(best - self.block, 0) / BINS
        return Choice(min(best + 1, self.block), price, float(seconds[best]), lost)
