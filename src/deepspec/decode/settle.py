"""What a round decided, with one wait for the device, and which rows rest on infinities or NaN.

R rows, γ proposals, Q = γ + 1 new tokens per row, V vocabulary, m captured layers, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from deepspec.maths.finite import finite_layers
from deepspec.maths.host import sent
from deepspec.maths.slots import Ints
from deepspec.maths.verify import Sampling, Verdict, warp

LOGITS = "its logits"


class Fault(NamedTuple):
    """Numbers that are not finite: whether the target gave them, or else the draft, and which they are."""

    of_target: bool
    part: str


class Settled(NamedTuple):
    """Per row: tokens accepted, the one that follows them, and the confidences [γ] of its proposals, if there
    are any. faults: of the rows that have one.
    features: as the draft may read them; the vectors of a token are zero if one of them is not finite.
    unsound: rows with anything that is not finite, be it of a rejected proposal."""

    accepted: list[int]
    next_token: list[int]
    confidence: list[list[float]]
    faults: dict[int, Fault]
    features: Tensor | None
    unsound: set[int]

    def replace(self, row: int, other: Settled) -> None:
        """Take a row's part from another one, of that row alone."""
        del self.faults[row]
        if other.faults:
            self.faults[row] = other.faults[0]
        self.accepted[row], self.next_token[row] = other.accepted[0], other.next_token[0]
        if self.features is not None and other.features is not None:
            self.features[row, : other.features.shape[1]] = other.features[0]


def settle(
    verdict: Verdict,
    p: Tensor,
    q: Tensor,
    confidence: Tensor | None,
    features: Tensor | None,
    layers: Ints,
) -> Settled:
    """Read a verdict on p [R, Q, V] and q [R, γ, V] with what it rests on: the target's logits and features
    [R, Q, m*d] up to where each row stopped, all of the draft's logits, and its confidences."""
    columns = [verdict.accepted[:, None], verdict.next_token[:, None], p[..., 0], q[..., 0]]
    columns.append(p[:, :0, 0] if confidence is None else confidence.to(p.device))
    # A sum is finite if all its parts are, and costs less than asking each of them.
    columns.append(p[:, :0, 0] if features is None else features.sum(-1, dtype=torch.float32))
    ends = list(accumulate(column.shape[1] for column in columns))
    rows = torch.cat(columns, dim=1).tolist()  # in float32, which holds a token id exactly
    accepted, next_token = [int(r[0]) for r in rows], [int(r[1]) for r in rows]
    faults: dict[int, Fault] = {}
    unsound = set[int]()
    for i, row in enumerate(rows):
        if all(map(isfinite, row)):
            continue
        unsound.add(i)
        _, _, of_target, of_draft, sure, _ = (
            row[start:end] for start, end in zip([0, *ends], ends, strict=False)
        )
        kept = accepted[i] + 1
        if features is not None and (layer := first_layer(features[i, :kept], layers)):
            faults[i] = Fault(True, layer)
        elif not all(map(isfinite, of_target[:kept])):
            faults[i] = Fault(True, LOGITS)
        elif not all(map(isfinite, of_draft)):
            faults[i] = Fault(False, LOGITS)
        elif not all(map(isfinite, sure)):
            faults[i] = Fault(False, "its confidences")
    if features is not None and unsound:
        # Even as padding, NaN would reach every later round of its slot, through any mask.
        broken = ~finite_layers(features, len(layers)).all(-1, keepdim=True)
        features = features.masked_fill(broken, 0.0)
    sure = [row[ends[3] : ends[4]] for row in rows]
    return Settled(accepted, next_token, sure, faults, features, unsound)


def warped(
    logits: Callable[[Tensor], Tensor], hidden: Tensor, counts: Ints, samplings: Sequence[Sampling]
) -> Tensor:
    """[R, Q, V] distributions of last hidden states [R, Q, d], each row's by its own sampling; only the first
    `counts` [R] of a row are real, and the others are not computed but zero."""
    rows, width = hidden.shape[:2]
    if min(counts) == width:
        return warp(logits(hidden), samplings)
    real = sent(torch.tensor([r * width + q for r, n in enumerate(counts) for q in range(n)]), hidden.device)
    each = [s for s, n in zip(samplings, counts, strict=True) for _ in range(n)]
    p = warp(logits(hidden.flatten(0, 1).index_select(0, real)), each)
    return p.new_zeros(rows * width, p.shape[-1]).index_copy_(0, real, p).unflatten(0, (rows, width))


def first_layer(features: Tensor, layers: Ints) -> str | None:
    """The first of the layers whose part of features [..., m*d] is not finite; None if all of it is."""
    sound = finite_layers(features, len(layers)).flatten(0, -2).all(0).tolist()
    return next((f"layer {layer}" for layer, ok in zip(layers, sound, strict=True) if not ok), None)
