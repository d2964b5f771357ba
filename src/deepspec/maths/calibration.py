"""Whether confidences mean what they say: errors of calibration, and the temperatures that mend them.

A confidence c_k is the probability that position k of a block is accepted if all positions before it were.
Its cumulative product a_k = c_1 … c_k, the survival, is what a schedule ranks tokens by, so that is what must
be calibrated (method.md 5).

N rounds, γ positions, B bins, P prompts, T temperatures.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15
"""Bins of equal width, as SGLang's own fitter has them, so that the same data give the same temperatures."""
EDGE = 1e-8
"""Probabilities are kept this far from 0 and 1, as there."""


def grid() -> Tensor:
    """[41] temperatures from 0.1 to 10, evenly spaced in their logarithm (SGLang's grid)."""
    return torch.logspace(-1, 1, 41).double()


def survived(accepted: Tensor, block: int) -> Tensor:
    """[N, γ] bool, whether positions 1…k were all accepted, from the number accepted in each round [N]."""
    return torch.arange(block) < accepted[:, None]


def survivals(logits: Tensor, temperatures: Tensor | None = None) -> Tensor:
    """[N, γ] cumulative products of confidences, from their logits [N, γ] and a temperature per position."""
    scaled = logits.double() if temperatures is None else logits.double() / temperatures
    return scaled.sigmoid().cumprod(-1)


def binned(probabilities: Tensor, outcomes: Tensor, groups: Tensor | None = None) -> Tensor:
    """[G, B, 3] per group and bin: how many, the sum of probabilities, the sum of outcomes.

    probabilities, outcomes, groups: [N]; without `groups` there is one group of all. A probability lies in
    the bin ⌊p · B⌋.
    """
    p = probabilities.double().clamp(EDGE, 1 - EDGE)
    place, count = (p * BINS).long().clamp(0, BINS - 1), 1
    if groups is not None and len(groups):
        place, count = groups * BINS + place, int(groups.max()) + 1
    sums = torch.zeros(count * BINS, 3, dtype=torch.float64, device=p.device)
    sums.index_add_(0, place, torch.stack([torch.ones_like(p), p, outcomes.double()], dim=-1))
    return sums.view(count, BINS, 3)


def calibration_error(sums: Tensor) -> Tensor:
    """Expected calibration error from sums [..., B, 3] (`binned`): the mean over all samples of the distance
    between a bin's mean probability and its share of outcomes; NaN without samples."""
    counts, predicted, happened = sums.unbind(-1)
    return (predicted - happened).abs().sum(-1) / counts.sum(-1)


def brier(probabilities: Tensor, outcomes: Tensor) -> float:
    """Mean squared distance between probabilities and outcomes [N]; NaN without samples."""
    return float((probabilities.double() - outcomes.double()).square().mean())


def auc(scores: Tensor, outcomes: Tensor) -> float | None:
    """Area under the ROC curve of scores [N] for bool outcomes [N]: the probability that a sample which
    happened has the higher score, ties counting half; None unless there are samples of both kinds."""
    positive = int(outcomes.sum())
    negative = len(outcomes) - positive
    if not positive or not negative:
        return None
    _, place, counts = scores.double().unique(return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0).double() - (counts - 1) / 2  # the mean rank of each group of ties, from 1
    above = float(ranks[place][outcomes.bool()].sum()) - positive * (positive + 1) / 2
    return above / (positive * negative)


def fit_temperatures(logits: Tensor, accepted: Tensor, choices: Tensor | None = None) -> Tensor:
    """[γ] temperatures by sequential scaling (method.md 5), from logits [N, γ] and accepted counts [N].

    Position by position, the temperature of `choices` (`grid`) with the least calibration error of the
    survival, the positions before it already scaled; of equal ones the first. Raises ValueError without
    rounds.
    """
    rounds, block = logits.shape
    if not rounds:
        raise ValueError("temperatures cannot be fitted without rounds")
    choices = grid() if choices is None else choices
    outcomes, scaled = survived(accepted, block), torch.ones(rounds, dtype=torch.float64)
    groups = torch.arange(len(choices)).repeat_interleave(rounds)
    fitted = []
    for k in range(block):
        tried = scaled * (logits[:, k].double() / choices[:, None]).sigmoid()  # [T, N]
        sums = binned(tried.flatten(), outcomes[:, k].repeat(len(choices)), groups)
        best = int(calibration_error(sums).argmin())
        fitted.append(choices[best])
        scaled = tried[best]
    return torch.stack(fitted)


def bootstrapped_error(sums: Tensor, seed: int, samples: int = 1000) -> tuple[float, float]:
    """The ends of the 95% interval, over whole prompts, of the calibration error, meaned over positions.

    sums: [P, γ, B, 3], of each prompt and position (`binned`). Prompts are resampled, since the rounds of one
    prompt are not independent.
    """
    prompts = len(sums)
    chosen = torch.randint(prompts, (samples, prompts), generator=torch.Generator().manual_seed(seed))
    weights = torch.zeros(samples, prompts, dtype=torch.float64)
    weights.scatter_add_(1, chosen, torch.ones(samples, prompts, dtype=torch.float64))
    drawn = (weights @ sums.flatten(1)).unflatten(1, sums.shape[1:])
    errors = calibration_error(drawn).mean(-1)
    low, high = errors.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def noise(logits: Tensor, seed: int, samples: int = 20) -> float:
    """The calibration error, meaned over positions, that N rounds of these confidences [N, γ] show if the
    confidences are the truth: what an error is made of by chance alone."""
    random, expected = torch.Generator().manual_seed(seed), survivals(logits)
    found = []
    for _ in range(samples):
        drawn = torch.rand(logits.shape, generator=random, dtype=torch.float64) < logits.sigmoid()
        outcomes = drawn.cumprod(-1)
        columns = zip(expected.unbind(1), outcomes.unbind(1), strict=True)
        found.append(torch.stack([calibration_error(binned(p, y))[0] for p, y in columns]).mean())
    return float(torch.stack(found).mean())
