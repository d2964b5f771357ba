"""A simulator of serving: policies replayed on recorded traces, with the step costs of a machine.

It does what the decoder does: a waiting request is read as soon as a slot is free, while the others wait;
otherwise a round runs over all rows. The policies are those of the decoder.

R rows in flight, γ positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from deepspec.schedule.costs import StepCosts
from deepspec.schedule.named import policy_of
from deepspec.schedule.policies import Fixed, Floats, Lengths, Load, Policy, Seconds
from deepspec.schedule.traces import Traces

BURST, CALM, BURSTS = 4.0, 0.25, 10.0
"""Bursty arrivals: the rates in bursts and between them, as shares of the mean one, and the requests of a
mean burst. A fifth of the time is in bursts."""
LATE = 1.1
"""A load that comes by itself is too much if its last request begins later than this share of the time."""


@dataclass(frozen=True)
class Arrivals:
    """users: a closed loop, in which each sends a request when the one before is answered. Otherwise `rate`
    requests per second come at random (Poisson), or in bursts."""

    users: int | None = None
    rate: float = 0.0
    bursty: bool = False

    def times(self, seed: int) -> Iterator[float]:
        """When requests come that come by themselves, in seconds."""
        random, now, left, burst = np.random.default_rng(seed), 0.0, 0.0, True
        while True:
            wait = random.exponential()  # in requests: time passes at the rate of its part
            while self.bursty and left < wait:
                wait, now = wait - left, now + left / (self.rate * (BURST if burst else CALM))
                burst = not burst
                left = random.exponential(BURSTS if burst else BURSTS * 4 * CALM / BURST)
            left -= wait
            now += wait / (self.rate * ((BURST if burst else CALM) if self.bursty else 1.0))
            yield now


@dataclass(frozen=True)
class Outcome:
    """What a policy gave under a load, once it was under way.

    tokens_per_s: of all users; per_user: the median over requests of their tokens per second, waiting
    included; first_s, answer_s: medians and 95th percentiles of the time to the first and the last token;
    rows: in flight in a mean round; verified, kept: proposals verified and tokens kept per row and round;
    drafted: the share of rounds with proposals. too_much: requests came faster than they were served.
    """

    tokens_per_s: float
    per_user: float
    first_s: tuple[float, float]
    answer_s: tuple[float, float]
    rows: float
    verified: float
    kept: float
    drafted: float
    too_much: bool


class Oracle(Policy):
    """Is told what will be accepted (`outcomes` [R]) before it decides, and pays nothing for uneven rows: no
    lossless policy does better in a round."""

    def __init__(self, seconds: Seconds) -> None:
        self.seconds, self.outcomes, self.most = seconds, np.zeros(0, np.int64), 0

    def proposes(self, load: Load) -> bool:
        hits = int(self.outcomes.sum())
        plain, drafted = self.seconds(load, hits)[:2]
        throughput = (load.rows + np.arange(hits + 1.0)) / drafted
        self.most = int(throughput.argmax())
        return bool(throughput[self.most] > load.rows / plain)

    def lengths(self, confidences: Floats, load: Load) -> Lengths:
        before = self.outcomes.cumsum() - self.outcomes
        return np.clip(self.most - before, 0, self.outcomes)


class Trimmed(Policy):
    """Verifies everything, and then keeps what another policy would have admitted: lossless and wasteful."""

    def __init__(self, inner: Policy) -> None:
        self.inner = inner

    def proposes(self, load: Load) -> bool:
        return self.inner.proposes(load)

    def lengths(self, confidences: Floats, load: Load) -> Lengths:
        return self.inner.lengths(confidences, load)

    def learn(self, proposed: Lengths, gained: Lengths) -> None:
        self.inner.learn(proposed, gained)


def simulated(name: str, costs: StepCosts, block: int) -> Policy:
    """A policy by its name: those of `policy_of`, `trim:` before one of them, and `oracle`. Raises ValueError
    for any other name."""
    kind, _, rest = name.partition(":")
    if name == "oracle":
        return Oracle(costs.rounds())
    if kind == "trim":
        return Trimmed(simulated(rest, costs, block))
    return policy_of(name, costs, block) or Fixed(block)


@dataclass(eq=False)
class _Row:
    """A request in flight: its number, its first and next positions and the end of them, the tokens that the
    target holds of it, and how many of these the draft has not seen."""

    number: int
    start: int
    at: int
    end: int
    held: int
    unseen: int


@dataclass
class _Counts:
    """Sums over the rounds that count."""

    begun: int = 0
    rounds: int = 0
    rows: int = 0
    verified: int = 0
    kept: int = 0
    drafted: int = 0


@dataclass(eq=False)
class Simulator:
    """Serves requests whose prompts and answers are those of the traces, in drawn orders. slots: the most
    rows in flight."""

    costs: StepCosts
    traces: Traces
    slots: int = 64
    seed: int = 0
    seconds: Seconds = field(init=False)

    def __post_init__(self) -> None:
        self.seconds = self.costs.rounds()

    def serve(self, policy: Policy, arrivals: Arrivals, requests: int) -> Outcome:
        """Serve so many requests, the same ones under each policy. What counts begins when a tenth of them,
        and each user's first, have begun, and ends when the last one begins."""
        traces, random = self.traces, np.random.default_rng(self.seed)
        passes = -(-requests // len(traces.prompts))
        order = np.concatenate([random.permutation(len(traces.prompts)) for _ in range(passes)])
        closed = arrivals.users is not None
        slots = min(self.slots, arrivals.users or self.slots)
        came = [0.0] * requests if closed else list(islice(arrivals.times(self.seed + 1), requests))
        warm = min(max(requests // 10, arrivals.users or 0), requests - 2)
        first, last, rows, counts = np.zeros(requests), np.zeros(requests), list[_Row](), _Counts()
        now, begun = 0.0, 0
        while begun < requests or rows:
            counting = counts if warm < begun < requests else _Counts()
            if begun < requests and len(rows) < slots and (came[begun] <= now or not rows):
                which = int(order[begun])
                came[begun] = now if closed else came[begun]
                held = int(traces.prompts[which])
                now = max(now, came[begun]) + float(self.costs.prefill_seconds(held, drafted=False))
                first[begun] = last[begun] = now
                start, end = traces.starts[which : which + 2].tolist()
                rows.append(_Row(begun, start, start, end, held, held))
                begun += 1
                counting.begun += 1
            else:
                now += self._round(policy, rows, counting)
                last[[row.number for row in rows]] = now
                rows = [row for row in rows if row.at < row.end]
        served = slice(warm, requests)
        answers = traces.starts[order + 1] - traces.starts[order] + 1
        waits, spans = (first - came)[served], (last - came)[served]
        return Outcome(
            float((counts.kept + counts.begun) / (first[-1] - first[warm])),
            float(np.median(answers[:requests][served] / spans)),
            _percentiles(waits),
            _percentiles(spans),
            counts.rows / max(counts.rounds, 1),
            counts.verified / max(counts.rows, 1),
            counts.kept / max(counts.rows, 1),
            counts.drafted / max(counts.rounds, 1),
            not closed and bool(first[-1] > LATE * came[-1]),
        )

    def _round(self, policy: Policy, rows: list[_Row], counts: _Counts) -> float:
        """One round over all rows; its seconds."""
        places = np.array([row.at for row in rows])
        fresh = sum(row.at == row.start for row in rows)
        load = Load(len(rows), sum(row.held for row in rows) / len(rows), fresh)
        # Of what is accepted, only what the answer still lacks is of use.
        hits = np.minimum(self.traces.accepted[places], [row.end - row.at - 1 for row in rows])
        if isinstance(policy, Oracle):
            policy.outcomes = hits
        taken = lengths = np.zeros(len(rows), np.int64)
        plain, drafted, _, ragged = self.seconds(load, len(rows) * self.traces.block)
        took, asked = plain, policy.proposes(load)
        if asked:
            lengths = policy.lengths(self.traces.confidences[places], load)
            taken = np.minimum(hits, lengths)
            verified = len(drafted) - 1 if isinstance(policy, Trimmed) else int(lengths.sum())
            even, longest = float(drafted[verified]), max(verified, len(rows) * int(lengths.max()))
            uneven = 0.0 if isinstance(policy, Oracle) else ragged * (float(drafted[longest]) - even)
            took = even + uneven + self._seen(rows)
            counts.verified += verified
        policy.learn(lengths, taken)
        for row, new in zip(rows, (taken + 1).tolist(), strict=True):
            row.at, row.held = row.at + new, row.held + new
            row.unseen = 0 if asked else row.unseen + new
        counts.rounds += 1
        counts.rows += len(rows)
        counts.kept += int(taken.sum()) + len(rows)
        counts.drafted += asked
        return took

    def _seen(self, rows: list[_Row]) -> float:
        """Seconds in which the draft reads what it missed; new tokens are read with the proposals."""
        missed = np.array([row.unseen for row in rows if row.unseen > self.traces.block + 1])
        return float(self.costs.observe_seconds(missed).sum()) if len(missed) else 0.0


def _percentiles(values: Floats) -> tuple[float, float]:
    low, high = np.percentile(values, [50, 95]).tolist()
    return low, high
