"""Rounds without a draft: plain decoding in a draft's shape, and a draft that waits until it proposes.

R rows, Q observed tokens per row, m captured layers, d hidden width, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from deepspec.drafts.base import Draft, Proposal
from deepspec.maths.slots import Ints, Ragged
from deepspec.maths.verify import Samplings

MOST_DEFERRED = 256
"""Tokens per row that wait for a draft: each of them holds m*d numbers."""


class NoDraft:
    """Plain decoding in the draft's shape: proposes nothing, so every round commits one token."""

    name = "plain"
    max_proposals = 0
    feature_layers: tuple[int, ...] = ()

    def open(self, slot: int) -> None:
        pass

    def free(self, slot: int) -> None:
        pass

    def observe(self, slots: Ints, features: Tensor | None, tokens: Ragged, next_tokens: Ragged) -> None:
        pass

    def propose(self, slots: Ints, anchors: Ints, samplings: Samplings, uniforms: Tensor) -> Proposal:
        return Proposal(torch.zeros(len(slots), 0, dtype=torch.long), torch.zeros(len(slots), 0, 0), None)


@dataclass
class Piece:
    """What one `observe` was given; `slots` maps each slot that still waits to its row."""

    slots: dict[int, int]
    features: Tensor | None
    tokens: Ragged
    next_tokens: Ragged


class Deferred:
    """A draft that observes as usual while it proposes, and else only when it is about to propose again, all
    that it missed in one piece.

    So a round in which a policy asks for no proposals does none of the draft's work. A row that has more than
    `most` tokens waiting is observed at once, which bounds the memory.
    """

    def __init__(self, draft: Draft, most: int = MOST_DEFERRED) -> None:
        self.draft, self.most = draft, most
        self.name, self.max_proposals = draft.name, draft.max_proposals
        self.feature_layers = draft.feature_layers
        self.pieces: list[Piece] = []
        self.waiting: dict[int, int] = {}
        """Tokens that wait, by slot."""
        self.unread = set[int]()
        """Slots whose prompts have not come yet."""
        self.asked, self.speculating = False, True
        """Whether it has proposed since the last round; whether it did in the last one."""

    def open(self, slot: int) -> None:
        self.unread.add(slot)
        self.draft.open(slot)

    def free(self, slot: int) -> None:
        self.unread.discard(slot)
        self._taken({slot})
        self.draft.free(slot)

    def observe(self, slots: Ints, features: Tensor | None, tokens: Ragged, next_tokens: Ragged) -> None:
        prompt = slots[0] in self.unread
        self.unread.difference_update(slots)
        if not prompt:
            self.speculating, self.asked = self.asked, False
        if self.speculating:
            self.draft.observe(slots, features, tokens, next_tokens)
            return
        self.pieces.append(Piece({s: i for i, s in enumerate(slots)}, features, tokens, next_tokens))
        for slot, new in zip(slots, tokens, strict=True):
            self.waiting[slot] = self.waiting.get(slot, 0) + len(new)
        self._flush({slot for slot in slots if self.waiting[slot] > self.most})

    def propose(self, slots: Ints, anchors: Ints, samplings: Samplings, uniforms: Tensor) -> Proposal:
        self._flush(set(slots))
        self.asked = self.speculating = True
        return self.draft.propose(slots, anchors, samplings, uniforms)

    def _flush(self, slots: set[int]) -> None:
        """Let the draft observe what waits for these slots, rows of about the same width together."""
        if not slots & self.waiting.keys():
            return
        if len(self.pieces) == 1 and list(self.pieces[0].slots) == sorted(slots):
            (piece,), self.pieces, self.waiting = self.pieces, [], {}
            if len(piece.slots) == len(piece.tokens):  # no row of it has gone since
                self.draft.observe(list(piece.slots), piece.features, piece.tokens, piece.next_tokens)
                return
            self.pieces = [piece]
        widths: defaultdict[int, list[int]] = defaultdict(list)
        rows = self._taken(slots)
        for slot in sorted(rows):
            widths[sum(len(p.tokens[row]) for p, row in rows[slot]).bit_length()].append(slot)
        for group in widths.values():
            tokens, following = (
                [[t for p, row in rows[slot] for t in getattr(p, name)[row]] for slot in group]
                for name in ("tokens", "next_tokens")
            )
            features = None
            if self.feature_layers:
                parts = [torch.cat([_features(p, row) for p, row in rows[slot]]) for slot in group]
                features = pad_sequence(parts, batch_first=True)
            self.draft.observe(group, features, tokens, following)

    def _taken(self, slots: set[int]) -> dict[int, list[tuple[Piece, int]]]:
        """The pieces and rows that wait for each of these slots, in their order; they wait no longer."""
        found: defaultdict[int, list[tuple[Piece, int]]] = defaultdict(list)
        for piece in self.pieces:
            for slot in slots & piece.slots.keys():
                found[slot].append((piece, piece.slots.pop(slot)))
        self.pieces = [piece for piece in self.pieces if piece.slots]
        for slot in slots:
            self.waiting.pop(slot, None)
        return found


def _features(piece: Piece, row: int) -> Tensor:
    """[Q, m*d] of one row's tokens, without the padding."""
    assert piece.features is not None
    return piece.features[row, : len(piece.tokens[row])]
