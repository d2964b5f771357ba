"""Anchors, slots, labels and masks: which token a draft's row predicts is decided here and nowhere else.

B sequences, S tokens, A anchors, γ (`block`) slots per block, K unroll steps, m captured layers, d hidden.
Positions are 0-based token indices. "Supervised" means `loss_mask` is 1 there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class FeatureBatch:
    """What every feature source hands to a draft's loss: right-padded rows.

    input_ids [B, S] int64; loss_mask [B, S] bool; features [B, S, m*d] (raw decoder-layer outputs,
    concatenated in the order of the target layer ids); last_hidden [B, S, d] after the final norm, or None
    if the source has none: a loss without a teacher reads none; lengths [B] int64, real tokens of each
    row; row_ids [B] names of the rows. Positions that no loss reads (`Reads`) may hold
    anything finite.
    position_ids [B, S] and segment_ids [B, S] say which packed document a token belongs to and where
    in it; None means one document per row, positions 0…S-1.
    features and last_hidden are on the draft's device. All else is on the host, where everything that follows
    from it (anchors, slots, rows that count) is decided without waiting for the device.
    """

    input_ids: Tensor
    loss_mask: Tensor
    features: Tensor
    last_hidden: Tensor | None
    lengths: Tensor
    row_ids: tuple[str, ...] = ()
    position_ids: Tensor | None = None
    segment_ids: Tensor | None = None

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of γ slots that start at anchors (method.md 3), on the host. All but `anchors` and `kept` are
    [B, A, γ]. Not a tuple: FSDP would move what a tuple holds to the device."""

    anchors: Tensor
    """[B, A] position of each block's anchor; 0 for a dummy."""
    kept: Tensor
    """[B, A] bool: false for a dummy, which only fills the rectangle."""
    input_ids: Tensor
    """The anchor's token, then mask tokens (a dummy holds mask tokens only)."""
    positions: Tensor
    """anchor … anchor+γ-1."""
    labels: Tensor
    """The token that each slot predicts (clamped inside the sequence; see `valid`)."""
    previous: Tensor
    """The token before each slot's label: what a sequential head is conditioned on."""
    teacher_index: Tensor
    """Position whose last hidden state gives the target's distribution for the label."""
    valid: Tensor
    """Bool: the slot counts in the loss."""


def anchor_candidates(loss_mask: Tensor, segment_ids: Tensor | None = None) -> Tensor:
    """[B, S-1] bool: t may be an anchor when t and t+1 are supervised (and in one document)."""
    supervised = loss_mask.bool()
    candidates = supervised[:, :-1] & supervised[:, 1:]
    if segment_ids is not None:
        candidates = candidates & (segment_ids[:, :-1] == segment_ids[:, 1:])
    return candidates


def sample_anchors(
    loss_mask: Tensor,
    num_anchors: int,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Up to `num_anchors` per row, without replacement, sorted: (anchors [B, A], kept [B, A]).

    A is the largest number of anchors any row got, at least 1. Rows with fewer are filled with dummies.
    With one generator for each row, what a row gets depends neither on padding nor on the other rows.
    """
    candidates = anchor_candidates(loss_mask, segment_ids)
    if isinstance(generator, Sequence):
        # A longer draw begins with the shorter one's numbers (torch's uniform numbers on the CPU).
        scores = torch.stack([torch.rand(candidates.shape[1], generator=each) for each in generator])
    else:
        scores = torch.rand(candidates.shape, generator=generator)
    # One column more, never a candidate: even a row of a single token then has a place for its dummy.
    scores = torch.nn.functional.pad(scores.masked_fill(~candidates, -1.0), (0, 1), value=-1.0)
    most = int(candidates.sum(1).max()) if candidates.numel() else 0
    best, index = scores.topk(max(1, min(num_anchors, most)), dim=1)
    kept = best >= 0
    # Dummies sort to the end, and then take position 0.
    ordered, order = index.masked_fill(~kept, loss_mask.shape[1]).sort(1)
    kept = kept.gather(1, order)
    return ordered.masked_fill(~kept, 0), kept


def make_blocks(
    input_ids: Tensor,
    loss_mask: Tensor,
    anchors: Tensor,
    kept: Tensor,
    *,
    block: int,
    mask_token_id: int,
    sample_from_anchor: bool = True,
    segment_ids: Tensor | None = None,
) -> Blocks:
    """Slots and labels for given anchors. Labels count while they stay inside the sequence and form
    an unbroken supervised prefix of the block (method.md 3)."""
    rows, length = input_ids.shape
    slots = torch.arange(block, device=input_ids.device)
    positions = anchors[..., None] + slots
    # Slot j predicts the token at anchor + j + 1; in the older layout, its own (method.md 3, Alignment).
    label_index = positions + 1 if sample_from_anchor else positions
    inside = label_index < length
    # A dummy's labels all point at position 0.
    index = label_index.clamp(max=length - 1).masked_fill(~kept[..., None], 0)

    def at(values: Tensor, where: Tensor) -> Tensor:
        return values.gather(1, where.reshape(rows, -1)).view(where.shape)

    counts = inside & at(loss_mask.bool(), index)
    if segment_ids is not None:
        counts = counts & (at(segment_ids, index) == segment_ids.gather(1, anchors)[..., None])
    counts = counts & kept[..., None]
    if not sample_from_anchor:
        # Slot 0 predicts the anchor itself, which is already known: it starts the prefix, uncounted.
        counts[..., 0] = kept
    valid = counts.long().cumprod(-1).bool()
    if not sample_from_anchor:
        valid[..., 0] = False
    labels = at(input_ids, index)
    anchor_tokens = at(input_ids, anchors.masked_fill(~kept, 0))
    ids = torch.full_like(index, mask_token_id)
    ids[..., 0] = torch.where(kept, anchor_tokens, ids[..., 0])
    previous = torch.cat([anchor_tokens[..., None], labels[..., :-1]], dim=-1)
    return Blocks(anchors, kept, ids, positions, labels, previous, (index - 1).clamp(min=0), valid)


def unroll_ids(input_ids: Tensor, step: int) -> Tensor:
    """[B, S] token fed at row i of unroll step `step`: input_ids[i + 1 + step], 0 past the end."""
    shift = step + 1
    return torch.nn.functional.pad(input_ids, (0, shift))[:, shift:]


def unroll_masks(loss_mask: Tensor, lengths: Tensor, steps: int, segment_ids: Tensor | None = None) -> Tensor:
    """[K, B, S] bool: rows that count at each unroll step.

    The published recipe's mask: `loss_mask` with the last real token's entry zeroed, moved left by
    the step, not the label token's own mask (method.md 4). In a packed row, position i + step + 1, whose
    distribution row i learns, must be in row i's document; it may be the last there, as it may in a document
    that has a row of its own.
    """
    mask = loss_mask.bool().clone()
    mask[torch.arange(len(mask), device=mask.device), (lengths - 1).clamp(min=0)] = False
    counted = []
    for step in range(steps):
        moved = torch.nn.functional.pad(mask, (0, step))[:, step:]
        if segment_ids is not None:
            # Past the end of the row, the mask is zero already.
            where = unroll_teacher_index(mask.shape[1], step, mask.device)
            moved = moved & (segment_ids[:, where] == segment_ids)
        counted.append(moved)
    return torch.stack(counted)


def unroll_teacher_index(length: int, step: int, device: torch.device | str = "cpu") -> Tensor:
    """[S] position whose last hidden state gives the soft label of row i: i + 1 + step (clamped)."""
    return (torch.arange(length, device=device) + step + 1).clamp(max=length - 1)


# ── which positions a loss reads ──────────────────────────────────────────────────────────────────────


class Reads(NamedTuple):
    """Positions [B, S] bool of the target's outputs that a loss can depend on, whatever anchors are drawn.

    What a source returns at other positions changes neither loss nor gradient, as long as it is finite.
    """

    features: Tensor
    hidden: Tensor

    def union(self, other: Reads) -> Reads:
        return Reads(self.features | other.features, self.hidden | other.hidden)


def context_reads(loss_mask: Tensor, lengths: Tensor, segment_ids: Tensor | None = None) -> Reads:
    """What every block draft reads: features as context, before a possible anchor of its document."""
    candidates = torch.nn.functional.pad(anchor_candidates(loss_mask, segment_ids), (0, 1))
    return Reads(_before_any(candidates, segment_ids, itself=False), torch.zeros_like(candidates))


def label_reads(loss_mask: Tensor, lengths: Tensor, segment_ids: Tensor | None = None) -> Reads:
    """What a block draft with a teacher also reads: the last hidden state at p-1 of each label p.

    A block's labels are an unbroken supervised run that starts behind its anchor, itself supervised. So p-1
    and p are both supervised: p-1 is itself a possible anchor, and every possible anchor has a first label.
    """
    candidates = torch.nn.functional.pad(anchor_candidates(loss_mask, segment_ids), (0, 1))
    return Reads(torch.zeros_like(candidates), candidates)


def unroll_reads(loss_mask: Tensor, lengths: Tensor, segment_ids: Tensor | None = None) -> Reads:
    """What Eagle-3 reads: features up to the last row that counts, the last hidden state after each such row.

    The first step decides: row i of step s counts only if row i+s counts at step 0; it reads no features that
    that row does not read, and learns the same distribution.
    """
    counted = unroll_masks(loss_mask, lengths, 1, segment_ids)[0]
    return Reads(
        _before_any(counted, segment_ids, itself=True), torch.nn.functional.pad(counted, (1, 0))[:, :-1]
    )


READ_RULES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Reads]] = {
    "context": context_reads,
    "labels": label_reads,
    "unroll": unroll_reads,
}
"""(loss_mask [B, S], lengths [B], segment_ids [B, S] or None) -> Reads, by the name that a feature cache
keeps: DFlash reads `context`, DSpark `context` and `labels`, Eagle-3 `unroll`."""


def with_last_hidden(rules: Collection[str]) -> bool:
    """Whether some of these READ_RULES read last hidden states."""
    return not {"labels", "unroll"}.isdisjoint(rules)


def _before_any(marked: Tensor, segment_ids: Tensor | None, *, itself: bool) -> Tensor:
    """[B, S] bool: a marked position of the same document comes later (or, with `itself`, is this one)."""
    if segment_ids is None:
        here_or_later = marked.flip(1).cumsum(1).flip(1) > 0
        return here_or_later if itself else torch.nn.functional.pad(here_or_later, (0, 1))[:, 1:]
    length = marked.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=marked.device).triu(0 if itself else 1)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return (later & same & marked[:, None, :]).any(-1)
