"""Prompt lookup: propose what followed the last n-gram where it occurred before. No model, same shape."""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec.drafts.base import Proposal
from deepspec.maths.slots import Ints, Ragged
from deepspec.maths.verify import Samplings, one_hot


class PromptLookup:
    """Copies up to `block` tokens from the latest earlier occurrence of the longest matching n-gram.

    Where nothing matches it repeats the anchor: a wrong guess costs nothing but its place.
    """

    name = "prompt-lookup"
    feature_layers: tuple[int, ...] = ()

    def __init__(self, vocab_size: int, block: int = 7, longest: int = 3) -> None:
        self.vocab_size, self.block, self.longest = vocab_size, block, longest
        self.history: dict[int, list[int]] = {}
        self.seen: dict[int, dict[tuple[int, ...], int]] = {}

    @property
    def max_proposals(self) -> int:
        return self.block

    def open(self, slot: int) -> None:
        self.history[slot], self.seen[slot] = [], {}

    def free(self, slot: int) -> None:
        del self.history[slot], self.seen[slot]

    def observe(self, slots: Ints, features: Tensor | None, tokens: Ragged, next_tokens: Ragged) -> None:
        for slot, new in zip(slots, tokens, strict=True):
            history, seen = self.history[slot], self.seen[slot]
            for token in new:
                history.append(token)
                # An n-gram is entered once its continuation exists: its end is the position after it.
                for n in range(1, self.longest + 1):
                    if len(history) > n:
                        seen[tuple(history[-n - 1 : -1])] = len(history) - 1

    def propose(self, slots: Ints, anchors: Ints, samplings: Samplings, uniforms: Tensor) -> Proposal:
        guesses = [self._continue(slot, anchor) for slot, anchor in zip(slots, anchors, strict=True)]
        tokens = torch.tensor(guesses)
        return Proposal(tokens, one_hot(tokens, self.vocab_size), None)

    def _continue(self, slot: int, anchor: int) -> list[int]:
        history = [*self.history[slot], anchor]
        for n in range(min(self.longest, len(history)), 0, -1):
            at = self.seen[slot].get(tuple(history[-n:]))
            if at is not None:
                # The copy may run into itself, as in a repeating pattern.
                for source in range(at, at + self.block):
                    history.append(history[source])
                return history[-self.block :]
        return [anchor] * self.block
