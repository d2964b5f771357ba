"""The output law of a `verify`, enumerated on worlds small enough to visit every case.

For every draft sequence, every uniform is replaced by one value from each interval on which the outcome can
not change, weighted by the interval's length; what is committed is extended by the target to a fixed
horizon and compared with the target's law.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from deepspec.maths.verify import Sampling, Verdict, warp
from reference.verification import Tree, cdf_points, cells, continuations, naive_residual

Verify = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Verdict]
Warp = Callable[[Tensor, Sampling], Tensor]
Lengths = Callable[[tuple[int, ...]], int]


@dataclass(frozen=True)
class World:
    """A target and a draft on a small vocabulary: one distribution per prefix each."""

    vocabulary: int
    block: int
    target: Tree
    draft: Tree


def prefixes(vocabulary: int, longest: int) -> list[tuple[int, ...]]:
    return [prefix for n in range(longest + 1) for prefix in product(range(vocabulary), repeat=n)]


def world(vocabulary: int, block: int, make: Callable[[], tuple[Tensor, Tensor]]) -> World:
    """`make` gives (target, draft) rows [V] for one prefix; kept as exact values of the float32 numbers."""
    target, draft = {}, {}
    for prefix in prefixes(vocabulary, block):
        p, q = make()
        target[prefix] = p.double().tolist()
        draft[prefix] = q.double().tolist()
    return World(vocabulary, block, target, draft)


def dense(vocabulary: int, block: int, seed: int) -> World:
    generator = torch.Generator().manual_seed(seed)

    def row() -> Tensor:
        return (1.5 * torch.randn(vocabulary, generator=generator)).softmax(-1)

    return world(vocabulary, block, lambda: (row(), row()))


def sparse(vocabulary: int, block: int, seed: int) -> World:
    """Zeros in both, independently: supports that overlap, nest or are disjoint."""
    generator = torch.Generator().manual_seed(seed)

    def row() -> Tensor:
        keep = torch.rand(vocabulary, generator=generator) < 0.5
        keep[int(torch.randint(vocabulary, (1,), generator=generator))] = True
        weights = torch.rand(vocabulary, generator=generator).add(0.05) * keep
        return weights / weights.sum()

    return world(vocabulary, block, lambda: (row(), row()))


def warped(
    vocabulary: int,
    block: int,
    seed: int,
    sampling: Sampling,
    warp: Warp = warp,
    draft: Sampling | None = None,
) -> World:
    """Both models warped, the draft by a `Sampling` of its own if it has one; coarse logits, for ties."""
    generator = torch.Generator().manual_seed(seed)

    def row(sampling: Sampling) -> Tensor:
        logits = torch.randint(-3, 4, (vocabulary,), generator=generator) / 2
        return warp(logits, sampling)

    return world(vocabulary, block, lambda: (row(sampling), row(draft or sampling)))


def constant(length: int) -> Lengths:
    return lambda tokens: length


def causal_lengths(seed: int, vocabulary: int, block: int) -> Lengths:
    """Token k is admitted, or the block cut before it, by a coin that only the tokens before k choose."""
    generator = torch.Generator().manual_seed(seed)
    admit = {
        prefix: bool(torch.rand(1, generator=generator) < 0.7) for prefix in prefixes(vocabulary, block - 1)
    }

    def length(tokens: tuple[int, ...]) -> int:
        return next((k for k in range(block) if not admit[tokens[:k]]), block)

    return length


def uniform_cells(world: World, tokens: tuple[int, ...]) -> list[list[tuple[float, float]]]:
    """Per column of `uniforms`, intervals on which neither `verify` nor any mutant below changes its mind."""
    p = [world.target[tokens[:k]] for k in range(world.block + 1)]
    q = [world.draft[tokens[:k]] for k in range(world.block)]
    columns = []
    for k, token in enumerate(tokens):
        columns.append(cells([p[k][token] / q[k][token], p[k][token]]))
    last: list[float] = [point for weights in (*p, *q) for point in cdf_points(weights)]
    for k in range(world.block):
        for a in (p[k], p[k + 1]):
            residual = naive_residual(a, q[k])
            last += cdf_points(residual)
            running = 0.0
            for weight in residual:  # the same, not normalised
                running += weight
                last.append(running)
    columns.append(cells(last))
    return columns


def committed_law(verify: Verify, world: World, length_of: Lengths) -> Tensor:
    """The law [V^(γ+1)] of the committed tokens, extended by the target to γ+1 tokens."""
    vocabulary, block = world.vocabulary, world.block
    rows: list[tuple[tuple[int, ...], tuple[float, ...]]] = []
    weights = []
    for tokens in product(range(vocabulary), repeat=block):
        drafted = math.prod(world.draft[tokens[:k]][tokens[k]] for k in range(block))
        if drafted == 0:
            continue
        for chosen in product(*uniform_cells(world, tokens)):
            rows.append((tokens, tuple(middle for middle, _ in chosen)))
            weights.append(drafted * math.prod(size for _, size in chosen))
    sequences = [tokens for tokens, _ in rows]
    unique = sorted(set(sequences))
    which = torch.tensor([unique.index(tokens) for tokens in sequences])
    p = torch.tensor([[world.target[t[:k]] for k in range(block + 1)] for t in unique])[which]
    q = torch.tensor([[world.draft[t[:k]] for k in range(block)] for t in unique])[which]
    lengths = torch.tensor([length_of(tokens) for tokens in unique])[which]
    uniforms = torch.tensor([middles for _, middles in rows], dtype=torch.float64)
    accepted, following = verify(p, q, torch.tensor(unique)[which], lengths, uniforms)

    mass: dict[tuple[int, ...], float] = {}
    outcomes = zip(sequences, accepted.tolist(), following.tolist(), weights, strict=True)
    for tokens, count, token, weight in outcomes:
        committed = (*tokens[:count], token)
        mass[committed] = mass.get(committed, 0.0) + weight
    law = torch.zeros(vocabulary ** (block + 1), dtype=torch.float64)
    for committed, weight in mass.items():
        extended = continuations(world.target, committed, block + 1, vocabulary)
        law += weight * torch.tensor(extended, dtype=torch.float64)
    return law


def check_lossless(verify: Verify, world: World, length_of: Lengths, truth: Tree | None = None) -> None:
    """`truth` is the target as it should be, where the world's own was made by a suspect `warp`."""
    law = committed_law(verify, world, length_of)
    target = continuations(truth or world.target, (), world.block + 1, world.vocabulary)
    error = (law - torch.tensor(target, dtype=torch.float64)).abs().max().item()
    assert error < 1e-6, f"the committed law is off by {error:.3g}"
