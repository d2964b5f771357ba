"""How much of a draft was accepted: accepted length, rates by position, bootstrap intervals, repetition.

Everything is counted from ragged lists, one list per prompt and in it one integer per verify round:

proposed   tokens the draft put forward (0…γ; a schedule may cut a round short of γ)
accepted   tokens of these that verification accepted, before any cut at the budget or a stop token
kept       tokens the round added to the output, replacement or bonus included, after that cut

A figure for which nothing was counted is None, never NaN. Lists that do not describe the same rounds raise
ValueError.

P prompts, n resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Rounds = Sequence[Sequence[int]]
Ratio = tuple[Sequence[float], Sequence[float]]
"""Numerators [P] and denominators [P]."""
RESAMPLES = 2000


class Interval(NamedTuple):
    """A figure with the ends of its 95% interval."""

    value: float
    low: float
    high: float


def tau(kept: Rounds) -> float | None:
    """Accepted length: Σ kept tokens / Σ rounds over all prompts, bonus included; not a mean of means."""
    rounds = sum(len(prompt) for prompt in kept)
    return sum(sum(prompt) for prompt in kept) / rounds if rounds else None


def survival(accepted: Rounds, proposed: Rounds, block: int) -> list[float | None]:
    """Share of rounds in which positions 1…k were all accepted, for k = 1…`block`.

    Only rounds that proposed at least k tokens are counted. If confidence cuts the lengths, those rounds are
    the promising ones: the figure is then a rate of what was tried, and need neither fall with k nor equal
    the product of the conditional rates.
    """
    rounds = list(_pairs(accepted, proposed, block))
    return [
        _share(sum(a >= k for a, _ in rounds), sum(length >= k for _, length in rounds))
        for k in range(1, block + 1)
    ]


def conditional(accepted: Rounds, proposed: Rounds, block: int) -> list[float | None]:
    """accepted(k) / reached(k) for k = 1…`block`.

    Position k is reached in a round that proposed at least k tokens and accepted the k-1 before it. A round
    cut below k has not reached k, even when everything it proposed was accepted.
    """
    rounds = list(_pairs(accepted, proposed, block))
    return [
        _share(sum(a >= k for a, _ in rounds), sum(length >= k and a >= k - 1 for a, length in rounds))
        for k in range(1, block + 1)
    ]


def verify_rate(accepted: Rounds, proposed: Rounds) -> float | None:
    """Σ committed / Σ (proposed + 1): the share of the verified positions that became output.

    Committed is accepted + 1, as verified: the cut at the budget or a stop token is not counted here.
    """
    rounds = list(_pairs(accepted, proposed))
    return _share(sum(a + 1 for a, _ in rounds), sum(length + 1 for _, length in rounds))


def bootstrap_ratio(
    numerators: Sequence[float], denominators: Sequence[float], seed: int, samples: int = RESAMPLES
) -> Interval | None:
    """Σ numerators / Σ denominators with its 95% percentile bootstrap interval over P prompts.

    Whole prompts are resampled, since the rounds of one prompt are not independent. The result is a function
    of the arguments alone. A resample whose denominators sum to zero has no ratio and is left out; the
    result is None if the sample itself has none. Raises ValueError if the lists differ in length.
    """
    sums = _resampled(numerators, denominators, seed=seed, samples=samples)
    return None if sums is None else _interval(sums[0] / sums[1])


def paired_bootstrap_difference(first: Ratio, second: Ratio, seed: int) -> Interval | None:
    """First ratio minus second, on the same P prompts.

    Both methods see the same resampled prompts, so that what they share (hard and easy prompts) cancels.
    Otherwise as `bootstrap_ratio`.
    """
    sums = _resampled(*first, *second, seed=seed)
    return None if sums is None else _interval(sums[0] / sums[1] - sums[2] / sums[3])


def paired_bootstrap_ratio(first: Ratio, second: Ratio, seed: int) -> Interval | None:
    """First ratio divided by second, a speed-up for example; otherwise as `paired_bootstrap_difference`.

    The result is also None if the second ratio is zero.
    """
    return mean_ratio_over_groups([(first, second)], seed)


def mean_ratio_over_groups(groups: Sequence[tuple[Ratio, Ratio]], seed: int) -> Interval | None:
    """Mean over groups (such as domains) of each group's paired ratio, prompts resampled within their group.

    Each group is (first, second) as `paired_bootstrap_ratio` takes them. Every group weighs the same,
    however many prompts it has. The result is None if any group has no ratio.
    """
    ratios = []
    for index, (first, second) in enumerate(groups):
        sums = _resampled(*first, *second, seed=seed + index)
        if sums is None:
            return None
        ratios.append((sums[0] / sums[1]) / (sums[2] / sums[3]))
    return _interval(torch.stack(ratios).mean(0)) if ratios else None


def distinct_share(token_lists: Sequence[Sequence[int]], n: int = 4) -> float | None:
    """Distinct n-grams / all n-grams, each list counted on its own and both counts summed over the lists.

    On its own, because two answers may well share a phrase; an answer that loops repeats itself.
    """
    grams = [
        [tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)] for tokens in token_lists
    ]
    return _share(sum(len(set(own)) for own in grams), sum(len(own) for own in grams))


def repeated_share(token_lists: Sequence[Sequence[int]], n: int = 8) -> float | None:
    """Share of n-grams that already occurred earlier in their own list."""
    distinct = distinct_share(token_lists, n)
    return None if distinct is None else 1.0 - distinct


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _pairs(accepted: Rounds, proposed: Rounds, block: int | None = None) -> Iterator[tuple[int, int]]:
    """(accepted, proposed) of every round, checked: accepted ≤ proposed ≤ block."""
    if [len(prompt) for prompt in accepted] != [len(prompt) for prompt in proposed]:
        raise ValueError("accepted and proposed must list the same rounds of the same prompts")
    for accepted_here, proposed_here in zip(accepted, proposed, strict=True):
        for count, length in zip(accepted_here, proposed_here, strict=True):
            if not 0 <= count <= length or (block is not None and length > block):
                raise ValueError(f"a round accepted {count} of {length} proposed tokens, block {block}")
            yield count, length


def _resampled(*columns: Sequence[float], seed: int, samples: int = RESAMPLES) -> Tensor | None:
    """Column sums [columns, 1 + n] in float64: the sample itself first, then n resamples of its prompts.

    None without prompts. Raises ValueError where the columns differ in length.
    """
    if len({len(column) for column in columns}) != 1:
        raise ValueError(f"one value per prompt is needed in each list, not {[len(c) for c in columns]}")
    values = torch.tensor(columns, dtype=torch.float64)
    prompts = values.shape[1]
    if prompts == 0:
        return None
    chosen = torch.randint(prompts, (samples, prompts), generator=torch.Generator().manual_seed(seed))
    return torch.cat([values.sum(1, keepdim=True), values[:, chosen].sum(-1)], dim=1)


def _interval(figures: Tensor) -> Interval | None:
    """The first of `figures` [1 + n] with the 2.5th and 97.5th percentile of the finite rest."""
    value, rest = figures[0], figures[1:]
    rest = rest[rest.isfinite()]
    if not value.isfinite() or not len(rest):
        return None
    low, high = rest.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(value), low, high)
