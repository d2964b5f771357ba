"""Which length of speculation pays at which load: acceptance × step costs.

N users, each with one request at a time; a request reads P tokens and writes A. K proposals are verified per row
and round, of which E are accepted on average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from deepspec.cost.acceptance import Acceptance
from deepspec.schedule.costs import StepCosts

NONE, SCHEDULED = "none", "scheduled"
KWH = 3.6e6
"""Joules."""


class Load(NamedTuple):
    """users: requests in flight, a closed loop. prompt, answer: their mean lengths in tokens."""

    users: int
    prompt: float
    answer: float


@dataclass(frozen=True)
class Choice:
    """A length of speculation at one load. verified, accepted: proposals per row and round. tokens_per_s: of
    all users together, with its interval; per_user: tokens/s that one user sees, reading of prompts included.
    joules: per token, cost: of a million tokens; None if they are not known. pays: per_user is enough."""

    name: str
    verified: float
    accepted: float
    tokens_per_s: float
    low: float
    high: float
    per_user: float
    joules: float | None
    cost: float | None
    pays: bool


def tokens_per_second(
    costs: StepCosts, load: Load, verified: float, accepted: float, lost: float = 0.0
) -> float:
    """Tokens per second of a closed loop in steady state.

    Each answer takes the reading of its prompt, for which the other rows wait and which gives its first token,
    and its share of the rounds. lost: tokens of its last round that are accepted and cut off.
    """
    rounds = (load.answer - 1 + lost) / (1 + accepted)
    context = load.prompt + load.answer / 2
    each = costs.round_seconds(load.users, load.users * (1 + verified), context, drafted=verified > 0)
    seconds = costs.prefill_seconds(load.prompt) + rounds * each / load.users
    return float(load.answer / seconds)


def choices(
    costs: StepCosts,
    acceptance: Acceptance,
    load: Load,
    *,
    scheduled: Sequence[tuple[float, float]] = (),
    watts: float | None = None,
    price: float | None = None,
    least: float = 0.0,
) -> list[Choice]:
    """Every choice at one load, the best first: those that give each user at least `least` tokens/s, then the
    quickest.

    scheduled: (verified, accepted) of the thresholds of a calibrated draft; the best of them is one choice.
    watts: the machine's power; price: of a kWh.
    """
    most, block = acceptance.accepted(len(acceptance.survival)), len(acceptance.survival)

    def choice(name: str, verified: float, accepted: float) -> Choice:
        def rate(share: float) -> float:
            lost = acceptance.lost * accepted / most if most else 0.0
            return tokens_per_second(costs, load, verified, accepted * share, lost)

        value = rate(1.0)
        low, high = rate(acceptance.low), rate(acceptance.high)
        joules = None if watts is None else watts / value
        cost = None if joules is None or price is None else joules * 1e6 / KWH * price
        per_user = value / load.users
        return Choice(name, verified, accepted, value, low, high, per_user, joules, cost, per_user >= least)

    found = [choice(NONE, 0, 0.0)]
    if costs.propose is not None:
        found += [choice(f"fixed:{k}", k, acceptance.accepted(k)) for k in range(1, block + 1)]
        cut = [choice(SCHEDULED, *pair) for pair in scheduled if pair[0] > 0]
        found += sorted(cut, key=lambda c: -c.tokens_per_s)[:1]
    return sorted(found, key=lambda c: (not c.pays, -c.tokens_per_s))


class Cell(NamedTuple):
    """The best fixed length at so many rows and tokens of context, and its speed over no speculation."""

    rows: int
    context: int
    length: int
    speedup: float


def break_even(costs: StepCosts, acceptance: Acceptance) -> list[Cell]:
    """The best length in every round of the table's rows × contexts; 0 where speculation does not pay."""
    cells = []
    for rows in costs.rows.tolist():
        for context in costs.contexts.tolist():
            rates = [
                (1 + acceptance.accepted(k))
                / float(costs.round_seconds(rows, rows * (1 + k), context, k > 0))
                for k in range(len(acceptance.survival) + 1 if costs.propose is not None else 1)
            ]
            best = max(range(len(rates)), key=rates.__getitem__)
            cells.append(Cell(rows, context, best, rates[best] / rates[0]))
    return cells


def beyond(costs: StepCosts, load: Load) -> list[str]:
    """What of a load lies beyond the table, in sentences."""
    longest = load.prompt + load.answer / 2
    found = []
    if load.users > costs.rows[-1]:
        found.append(f"{load.users} users are more than the {costs.rows[-1]} rows of the step costs")
    if longest > costs.contexts[-1]:
        found.append(
            f"{longest:.0f} tokens of context are more than the {costs.contexts[-1]} of the step costs"
        )
    return [f"{sentence}: the figures are extrapolated" for sentence in found]


def rehearsal(acceptance: Acceptance, length: int) -> dict[str, Any]:
    """Settings with which servers pretend this acceptance of `length` proposals: keys of vLLM's
    --speculative-config, and an environment variable of SGLang (accepted length, bonus included)."""
    rates, least = [], 1.0
    for rate in acceptance.survival[:length]:
        least = min(least, rate)  # vLLM refuses rates that rise, which few rounds may show
        rates.append(round(least, 6))
    return {
        "vllm": {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": rates},
        "sglang": {"SGLANG_SIMULATE_ACC_LEN": f"{1 + sum(rates):.4f}"},
    }


def plain(found: Mapping[int, Sequence[Choice]]) -> dict[str, Any]:
    """Choices by users, as JSON data."""
    return {str(users): [asdict(choice) for choice in ranked] for users, ranked in found.items()}
