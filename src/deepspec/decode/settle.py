"""What a round decided, with one wait for the device, and which rows rest on infinities or NaN.

R rows, γ proposals, Q = γ + 1 new tokens per row, V vocabulary, m captured layers, d hidden.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deepspec.drafts.base import Proposal
from deepspec.maths.finite import finite_layers
from deepspec.maths.slots import Ints
from deepspec.maths.verify import Verdict, defined

LOGITS = "its logits"


class Fault(NamedTuple):
    """Numbers that are not finite: whether the target gave them, or else the draft, and which they are."""

    of_target: bool
    part: str


class Settled(NamedTuple):
    """Per row: tokens accepted, and the one that follows them. faults: of the rows that have one.
    features: as the draft may read them; what is not finite is zero."""

    accepted: list[int]
    next_token: list[int]
    faults: dict[int, Fault]
    features: Tensor | None


def settle(
    verdict: Verdict, p: Tensor, q: Tensor, proposal: Proposal, features: Tensor | None, layers: Ints
) -> Settled:
    """Read a verdict on p [R, Q, V] and q [R, γ, V], and check what it rests on: the target's logits where
    the row stopped, all of the draft's, its confidences, and the features [R, Q, m*d] of committed tokens."""
    target = defined(p).gather(1, verdict.accepted[:, None])
    draft = defined(q).all(1, keepdim=True)
    sure = torch.ones_like(draft)
    if proposal.confidence is not None:
        sure = proposal.confidence.to(p.device).isfinite().all(1, keepdim=True)
    heard = torch.ones_like(p[..., 0], dtype=torch.bool)
    if features is not None:
        heard = finite_layers(features, len(layers)).all(-1)
    told = verdict.accepted[:, None], verdict.next_token[:, None], target, draft, sure, heard
    rows = torch.cat(told, dim=1).tolist()
    faults: dict[int, Fault] = {}
    for i, (accepted, _, target_sound, draft_sound, confidence_sound, *heard_sound) in enumerate(rows):
        if features is not None and not all(heard_sound[: accepted + 1]):
            faults[i] = Fault(True, first_layer(features[i, : accepted + 1], layers) or "")
        elif not target_sound:
            faults[i] = Fault(True, LOGITS)
        elif not (draft_sound and confidence_sound):
            faults[i] = Fault(False, LOGITS if not draft_sound else "its confidences")
    if features is not None and not all(all(row[5:]) for row in rows):
        # Even as padding, NaN would reach every later round of its slot, through any mask.
        features = features.masked_fill(~heard[..., None], 0.0)
    return Settled([row[0] for row in rows], [row[1] for row in rows], faults, features)


def first_layer(features: Tensor, layers: Ints) -> str | None:
    """The first of the layers whose part of features [..., m*d] is not finite; None if all of it is."""
    sound = finite_layers(features, len(layers)).flatten(0, -2).all(0).tolist()
    return next((f"layer {layer}" for layer, ok in zip(layers, sound, strict=True) if not ok), None)
