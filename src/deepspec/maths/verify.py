"""Speculative sampling: warp logits, draw tokens, accept or replace a draft's proposals.

The rule is Leviathan et al. 2023 (algorithm 1) and Chen et al. 2023 (algorithm 2): the committed tokens
follow the target's (warped) distribution exactly, whatever the draft proposes. Everything here is pure:
the random numbers come in as uniforms, so a test can enumerate the output law.

Shapes: R rows, γ proposals per row (`block` in code), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deepspec.maths.host import sent

COLDEST = 1e-38
"""A temperature below it is greedy: in float32 it is hardly, or not, above zero."""


@dataclass(frozen=True)
class Sampling:
    """How logits become probabilities: temperature, then top-k, then top-p.

    `temperature` 0 is greedy, whatever the other two say. `top_k` 0 and `top_p` 1 are off.
    Raises ValueError for a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be finite and at least 0, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0 (0 = off), not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1 (1 = off), not {self.top_p}")

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST


class Verdict(NamedTuple):
    """What a round decided, per row: `accepted` [R] int64 in 0…lengths, and the token that follows them."""

    accepted: Tensor
    next_token: Tensor


Samplings = Sampling | Sequence[Sampling]
"""One sampling for all rows, or one for each."""


def warp(logits: Tensor, samplings: Samplings) -> Tensor:
    """Logits [R, ..., V] of any float type to float32 probabilities [R, ..., V].

    With a sequence of R samplings, row r follows the r-th; with a single one there need not be an R.

    Greedy is the one-hot of the first maximum, never a softmax. Ties are never broken by sort order: top-k
    keeps every token whose logit equals the k-th largest, and top-p keeps a token while the tokens strictly
    more probable than it (after top-k, renormalised) hold less than `top_p`. So the most probable token
    always stays, and no row depends on the others or on their samplings.

    Logits without a finite maximum (one is NaN or +inf, or all are -inf) have no distribution: the first
    of their probabilities is NaN, whatever the others are. Raises ValueError unless there is one sampling per
    row.
    """
    if isinstance(samplings, Sampling):
        samplings = [samplings]
    elif len(samplings) != logits.shape[0]:
        raise ValueError(f"{len(samplings)} samplings for {logits.shape[0]} rows of logits")
    if len(set(samplings)) == 1:
        samplings = samplings[:1]
    drawn = [row for row, sampling in enumerate(samplings) if not sampling.greedy]
    if len(drawn) == len(samplings):
        return _warped(logits, samplings)
    probabilities = most_probable(logits)[1]
    if drawn:
        rows = sent(torch.tensor(drawn), logits.device)
        probabilities[rows] = _warped(logits[rows], [samplings[row] for row in drawn])
    return probabilities


def most_probable(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The first maximum [...] of logits [..., V], and the float32 distribution [..., V] with all mass on it,
    whose first value is NaN if that maximum is not finite."""
    largest, tokens = logits.max(-1)  # the first of equal ones
    probabilities = one_hot(tokens, logits.shape[-1])
    probabilities.select(-1, 0).add_(largest, alpha=0.0)
    return tokens, probabilities


def defined(probabilities: Tensor) -> Tensor:
    """[...] bool: whether `warp` found a distribution [..., V]. Its first value tells."""
    return ~probabilities[..., 0].isnan()


def one_hot(tokens: Tensor, vocab_size: int) -> Tensor:
    """[...] tokens -> [..., V] float32 distributions with all their mass on them."""
    zeros = torch.zeros(*tokens.shape, vocab_size, device=tokens.device)
    return zeros.scatter_(-1, tokens[..., None], 1.0)


def _warped(logits: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """`warp` of R rows that are not greedy, in one pass; a single sampling is for all rows.

    A row's numbers are to the bit what they are alone: a step that it does not ask for leaves it unchanged.
    """
    vocabulary = logits.shape[-1]

    def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        """[R, 1, ...], to stand next to the logits; [] of a single sampling."""
        shape = () if len(values) == 1 else (len(values), *[1] * (logits.dim() - 1))
        return sent(torch.tensor(values, dtype=dtype), logits.device).view(shape)

    scores = logits.float()
    temperatures = [s.temperature for s in samplings]
    if any(t != 1 for t in temperatures):
        # Relative to the maximum before dividing: a tiny temperature then cannot overflow to inf - inf.
        divided = (scores - scores.amax(-1, keepdim=True)) / column(temperatures)
        scores = torch.where(column(temperatures) == 1, scores, divided) if 1 in temperatures else divided
    limits = [s.top_k if s.top_k < vocabulary else 0 for s in samplings]
    if any(limits):
        top = scores.topk(max(limits), dim=-1)
        places = column([max(k, 1) - 1 for k in limits], torch.int64).expand(*scores.shape[:-1], 1)
        lowest = top.values.gather(-1, places).masked_fill(column(limits) == 0, -math.inf)
        scores = scores.masked_fill(scores < lowest, -math.inf)
    probabilities = scores.softmax(-1)
    masses = [s.top_p for s in samplings]
    if all(m == 1 for m in masses):
        return probabilities
    if all(k or m == 1 for k, m in zip(limits, masses, strict=True)):
        # A tie beyond the k-th place shares its value, so the k largest are enough to find the threshold.
        ordered = probabilities.gather(-1, top.indices)
    else:
        ordered = probabilities.sort(-1, descending=True).values
    above = ordered.cumsum(-1, dtype=_wide(ordered)) - ordered
    mass = column(masses, above.dtype)
    last = (above < mass).sum(-1, keepdim=True).clamp_min(1) - 1  # no place is below the mass if all are NaN
    lowest = ordered.gather(-1, last).masked_fill(mass == 1, 0.0)
    # Softmax again instead of dividing by a sum, whose rounding may depend on how many rows there are.
    return scores.masked_fill(probabilities < lowest, -math.inf).softmax(-1)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens [...] by inverse CDF from non-negative weights [..., V], which need not sum to one.

    `uniforms` [...] lie in [0, 1). A token of zero weight is never returned unless its whole row is zero, on
    any device: the CDF counts only where the weight is positive, and the level looked up is kept below the
    row's total, so neither rounding at the upper end nor a parallel scan can reach one.
    """
    cdf = probabilities.cumsum(-1, dtype=_wide(probabilities))
    cdf = torch.where(probabilities > 0, cdf, 0.0)
    total = cdf.amax(-1)
    level = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return (cdf > level.unsqueeze(-1)).view(torch.uint8).argmax(-1)  # argmax is the first maximum


def verify(p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor, uniforms: Tensor) -> Verdict:
    """One round of speculative sampling for R rows at once.

    p         [R, γ+1, V]  the target's warped probabilities; p[:, k] decides token k, p[:, γ] the bonus
    q         [R, γ, V]    exactly the float32 distributions that `tokens` were drawn from
    tokens    [R, γ]       the draft's proposals, int64
    lengths   [R]          how many of them count, each in 0…γ (not checked: that would wait for the device)
    uniforms  [R, γ+1]     in [0, 1); column k decides token k, the last column draws the next token

    Token k is accepted with probability min(1, p/q), left to right. The first rejection draws a replacement
    from norm(max(0, p - q)) at that position; a row whose `length` tokens all survive draws its bonus from
    p[:, length]. Lossless as long as `lengths` admits token k by looking at earlier tokens only. Where the
    residual has rounded to nothing (p equals q), the replacement comes from p.

    Raises ValueError when the shapes do not fit together.
    """
    rows, width, vocabulary = p.shape
    block = width - 1
    if q.shape != (rows, block, vocabulary) or tokens.shape != (rows, block):
        raise ValueError(
            f"p {tuple(p.shape)} needs q ({rows}, {block}, {vocabulary}) and tokens ({rows}, {block}), "
            f"not {tuple(q.shape)} and {tuple(tokens.shape)}"
        )
    if lengths.shape != (rows,) or uniforms.shape != (rows, width):
        raise ValueError(
            f"p {tuple(p.shape)} needs lengths ({rows},) and uniforms ({rows}, {width}), "
            f"not {tuple(lengths.shape)} and {tuple(uniforms.shape)}"
        )
    if block == 0:
        return Verdict(torch.zeros_like(lengths), draw(p[:, 0], uniforms[:, 0]))

    # Only the proposed tokens' probabilities are read here; the V-wide work is left for the stopping row.
    index = tokens.unsqueeze(-1)
    p_token = p[:, :block].gather(-1, index).squeeze(-1)
    q_token = q.gather(-1, index).squeeze(-1)
    counted = torch.arange(block, device=p.device) < lengths.unsqueeze(-1)
    survives = (uniforms[:, :block] * q_token < p_token) & counted
    accepted = survives.cumprod(-1).sum(-1)

    row = torch.arange(rows, device=p.device)
    target = p[row, accepted]
    residual = (target - q[row, accepted.clamp_max(block - 1)]).clamp_min_(0)
    replaces = (accepted < lengths) & (residual.amax(-1) > 0)
    return Verdict(accepted, draw(torch.where(replaces.unsqueeze(-1), residual, target), uniforms[:, block]))


def _wide(values: Tensor) -> torch.dtype:
    """The type to sum a CDF in: float64, where the device has it (Apple's does not)."""
    return torch.float32 if values.device.type == "mps" else torch.float64
