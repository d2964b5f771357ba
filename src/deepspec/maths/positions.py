"""How much each position of a block counts in the loss: by a fixed decay, or by what the draft does so far.

A position is worth what verification makes of it: it is only looked at if all positions before it were
accepted. N loss rows; G blocks, or unrolls; γ positions of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from deepspec.maths.host import sent

DPACE_ALPHA = 0.5
"""How far `dpace` moves a probability towards one, so that later positions learn from the start."""


class Positions(NamedTuple):
    """Where N loss rows stand, for weights that depend on whole blocks. rule: a key of `RULES`.

    block: [N] number of each row's block; place: [N] its position there, from 0; both int64 on the host.
    """

    rule: str
    block: Tensor
    place: Tensor


def position_weights(block: int, gamma: float) -> Tensor:
    """[block] float32 weights exp(-(k - 1) / gamma) of block positions k = 1 ... block (DFlash, DSpark)."""
    assert block >= 1 and gamma > 0, f"block and gamma must be positive, not {block} and {gamma}"
    return torch.exp(-torch.arange(block, dtype=torch.float32) / gamma)


def survival(rates: Tensor, real: Tensor) -> Tensor:
    """[G, γ] survival of the prefix, prod_{i<k} rate_i: the probability that position k is looked at.

    rates: [G, γ], zero where `real` is not. With l1 / 2, which is 1 - accept, the weighted loss of a block is
    sum_k survival_k - (expected accepted length), as survival_k accept_k is the probability that k tokens or
    more are accepted. The weights carry no gradient, so position k is pulled by how often it is looked at,
    not by what later positions would make of it.
    """
    before = rates[:, :-1].cumprod(1)
    return torch.cat([torch.ones_like(rates[:, :1]), before], dim=1)


def dpace(rates: Tensor, real: Tensor) -> Tensor:
    """[G, γ] weights of D-PACE (arXiv 2605.18810, equations 7 and 8): sum_{m>=k} prod_{i<=m} q_i, where q is
    the probability of the label, smoothed by `DPACE_ALPHA`. rates: [G, γ]; what is not `real` counts 0."""
    smoothed = ((1.0 - DPACE_ALPHA) * rates + DPACE_ALPHA) * real
    return smoothed.cumprod(1).flip(1).cumsum(1).flip(1)


class Rule(NamedTuple):
    """reads: the figure of a position that the weights are made of."""

    reads: str
    weights: Callable[[Tensor, Tensor], Tensor]


RULES = {"survival": Rule("accept", survival), "dpace": Rule("surprise", dpace)}
"""How weights follow from what the draft does, by the name that recipes use."""


def block_weights(at: Positions, rates: Tensor, rows: slice) -> Tensor:
    """Weights of some rows, which form whole blocks, without gradient. rates: of these rows. A position
    without a row ends its block: nothing survives it."""
    block, place = at.block[rows], at.place[rows]
    if not len(block):
        return rates
    block = block - block.min()
    table, real = rates.new_zeros(2, int(block.max()) + 1, int(place.max()) + 1)
    block, place = sent(block, rates.device), sent(place, rates.device)
    table[block, place], real[block, place] = rates, 1.0
    return RULES[at.rule].weights(table, real)[block, place]
