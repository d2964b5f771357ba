"""Anchors, slots, labels and masks by naive loops over Python lists: the oracle of `deepspec.maths.blocks`.

One sequence at a time: ids and masks are lists over its tokens (padding included), documents a list of
segment ids or None, blocks lists over slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Ints = Sequence[int]


class Slot(NamedTuple):
    """What one slot of a block is and predicts."""

    input_id: int
    position: int
    label: int
    previous: int
    teacher_index: int
    valid: bool


def naive_candidates(loss_mask: Ints, documents: Ints | None) -> list[int]:
    """Positions whose own token and next token are supervised, in one document."""
    return [
        t
        for t in range(len(loss_mask) - 1)
        if loss_mask[t] and loss_mask[t + 1] and (documents is None or documents[t] == documents[t + 1])
    ]


def naive_block(
    ids: Ints,
    loss_mask: Ints,
    anchor: int,
    *,
    block: int,
    mask_token_id: int,
    sample_from_anchor: bool,
    documents: Ints | None,
) -> list[Slot]:
    """The slots of a real block. Slot j predicts the token at anchor + j + 1, or anchor + j."""
    slots: list[Slot] = []
    unbroken = True
    for j in range(block):
        at = anchor + j + (1 if sample_from_anchor else 0)
        counts = at < len(ids) and bool(loss_mask[at])
        if counts and documents is not None:
            counts = documents[at] == documents[anchor]
        proposes = sample_from_anchor or j > 0
        if proposes:
            unbroken = unbroken and counts
        # Past the end there is nothing to read: the last token stands in, and does not count.
        inside = min(at, len(ids) - 1)
        slots.append(
            Slot(
                input_id=ids[anchor] if j == 0 else mask_token_id,
                position=anchor + j,
                label=ids[inside],
                previous=ids[anchor] if j == 0 else slots[-1].label,
                teacher_index=max(inside - 1, 0),
                valid=proposes and unbroken,
            )
        )
    return slots


def naive_dummy(ids: Ints, *, block: int, mask_token_id: int) -> list[Slot]:
    """The slots of a block that only fills a rectangle: anchored at 0, all labels there, none valid."""
    return [Slot(mask_token_id, j, ids[0], ids[0], 0, False) for j in range(block)]


def naive_attention(
    anchors: Ints, kept: Sequence[bool], *, block: int, length: int, documents: Ints | None
) -> list[list[bool]]:
    """[A*γ][S + A*γ]: who sees whom. Context strictly before the anchor, and the own block; a
    dummy sees its own block only."""
    rows = []
    for a, anchor in enumerate(anchors):
        for _ in range(block):
            row = [
                kept[a] and key < anchor and (documents is None or documents[key] == documents[anchor])
                for key in range(length)
            ]
            row += [other == a for other in range(len(anchors)) for _ in range(block)]
            rows.append(row)
    return rows


def naive_unroll_ids(ids: Ints, step: int) -> list[int]:
    """The token that row i reads at an unroll step."""
    return [ids[i + 1 + step] if i + 1 + step < len(ids) else 0 for i in range(len(ids))]


def naive_unroll_mask(loss_mask: Ints, length: int, step: int) -> list[bool]:
    """Whether row i counts: the supervision of position i + step, which must not be the last real token."""
    return [
        i + step < len(loss_mask) and i + step != length - 1 and bool(loss_mask[i + step])
        for i in range(len(loss_mask))
    ]


def naive_block_reads(
    loss_mask: Ints, documents: Ints | None, block: int, sample_from_anchor: bool
) -> tuple[set[int], set[int]]:
    """Positions whose features, and whose last hidden state, some anchor's block depends on."""
    features: set[int] = set()
    hidden: set[int] = set()
    ids = list(range(len(loss_mask)))
    for anchor in naive_candidates(loss_mask, documents):
        slots = naive_block(
            ids,
            loss_mask,
            anchor,
            block=block,
            mask_token_id=0,
            sample_from_anchor=sample_from_anchor,
            documents=documents,
        )
        hidden |= {slot.label - 1 for slot in slots if slot.valid}  # a token's id is its position here
        if any(slot.valid for slot in slots):
            features |= {t for t in range(anchor) if documents is None or documents[t] == documents[anchor]}
    return features, hidden


def naive_unroll_reads(
    loss_mask: Ints, documents: Ints | None, real: int, steps: int
) -> tuple[set[int], set[int]]:
    """Positions whose features, and whose last hidden state, some row of some unroll step depends on."""
    features: set[int] = set()
    hidden: set[int] = set()
    for step in range(steps):
        for row in range(len(loss_mask) - step - 1):
            teacher = row + step + 1
            together = documents is None or documents[row] == documents[teacher]
            if loss_mask[row + step] and row + step != real - 1 and together:
                hidden.add(teacher)
                features |= {t for t in range(row + 1) if documents is None or documents[t] == documents[row]}
    return features, hidden
