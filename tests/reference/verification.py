"""Naive float64 loops for warp, draw and verify, and the exact law of a target that depends on its prefix.

Slow and plain on purpose: lists of Python floats, one row at a time, nothing shared with the package.
A *tree* maps every prefix (a tuple of tokens) to the distribution of the token after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, product

Tree = dict[tuple[int, ...], list[float]]


def naive_warp(
    logits: Sequence[float], temperature: float, top_k: int = 0, top_p: float = 1.0
) -> list[float]:
    """Temperature, then top-k (ties with the k-th kept), then top-p (strictly larger mass below top_p)."""
    if temperature == 0:
        best = logits.index(max(logits))
        return [1.0 if token == best else 0.0 for token in range(len(logits))]
    scores = [value / temperature for value in logits]
    if top_k:
        smallest = sorted(scores, reverse=True)[:top_k][-1]
        scores = [value if value >= smallest else -math.inf for value in scores]
    weights = [math.exp(value - max(scores)) for value in scores]
    probabilities = [weight / math.fsum(weights) for weight in weights]
    kept = [
        value if top_p == 1 or nucleus_mass(probabilities, value) < top_p else 0.0 for value in probabilities
    ]
    return [value / math.fsum(kept) for value in kept]


def nucleus_mass(probabilities: Sequence[float], value: float) -> float:
    """The mass of all tokens strictly more probable than `value`."""
    return math.fsum(other for other in probabilities if other > value)


def naive_draw(weights: Sequence[float], uniform: float) -> int:
    """The first token at which the running sum passes uniform x total."""
    level = uniform * math.fsum(weights)
    running = 0.0
    for token, weight in enumerate(weights):
        running += weight
        if running > level:
            return token
    return max(token for token, weight in enumerate(weights) if weight > 0)


def naive_residual(p: Sequence[float], q: Sequence[float]) -> list[float]:
    """max(0, p - q), not normalised; p itself where nothing is left."""
    left = [max(0.0, a - b) for a, b in zip(p, q, strict=True)]
    return left if any(left) else list(p)


def naive_verify(
    p: Sequence[Sequence[float]],
    q: Sequence[Sequence[float]],
    tokens: Sequence[int],
    length: int,
    uniforms: Sequence[float],
) -> tuple[int, int]:
    """One row of speculative sampling: how many tokens are accepted, and the token after them."""
    for k in range(length):
        if not uniforms[k] * q[k][tokens[k]] < p[k][tokens[k]]:
            return k, naive_draw(naive_residual(p[k], q[k]), uniforms[-1])
    return length, naive_draw(p[length], uniforms[-1])


def cdf_points(weights: Sequence[float]) -> list[float]:
    """Where the inverse CDF of unnormalised weights changes token, in (0, 1)."""
    total, running, points = math.fsum(weights), 0.0, []
    for weight in weights:
        running += weight
        points.append(running / total)
    return points


def cells(points: Sequence[float]) -> list[tuple[float, float]]:
    """The intervals that `points` cut [0, 1) into, as (midpoint, length)."""
    edges = [0.0, *sorted({point for point in points if 0 < point < 1}), 1.0]
    return [((low + high) / 2, high - low) for low, high in pairwise(edges)]


def continuations(tree: Tree, prefix: tuple[int, ...], horizon: int, vocabulary: int) -> list[float]:
    """The law of the first `horizon` tokens in the order of `product`, given that it begins with `prefix`."""
    law = []
    for sequence in product(range(vocabulary), repeat=horizon):
        mass = 1.0 if sequence[: len(prefix)] == prefix else 0.0
        for position in range(len(prefix), horizon):
            if mass:
                mass *= tree[sequence[:position]][sequence[position]]
        law.append(mass)
    return law
