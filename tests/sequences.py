"""Cached steps next to whole passes: drives a target's slots as decoding does, and compares every output."""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec.targets import Target

CLOSE = 1e-4
"""Largest float32 difference allowed between one pass and cached steps; a wrong mask gives 0.1 and more."""


class Sequences:
    """Drives a target's slots and keeps the plain lists of tokens that they should hold."""

    def __init__(self, target: Target, layers: tuple[int, ...] = (-1, 1), seed: int = 0) -> None:
        self.target, self.layers = target, layers
        self.random = torch.Generator().manual_seed(seed)
        self.tokens: dict[int, list[int]] = {}

    def reopen(self, slot: int) -> None:
        if slot in self.tokens:
            self.target.free(slot)
        self.target.open(slot)
        self.tokens[slot] = []

    def rollback(self, slot: int, share: float) -> None:
        if slot in self.tokens:
            length = int(share * len(self.tokens[slot]))
            self.target.rollback(slot, length)
            del self.tokens[slot][length:]

    def assert_step(self, counts: dict[int, int]) -> None:
        """Append `counts[slot]` random tokens to each slot and compare with whole passes."""
        for slot in counts:
            if slot not in self.tokens:
                self.reopen(slot)
        new = {
            s: torch.randint(self.target.vocab_size, (n,), generator=self.random).tolist()
            for s, n in counts.items()
        }
        found = self.target.step(list(counts), list(new.values()), self.layers)
        for slot, tokens in new.items():
            self.tokens[slot].extend(tokens)
            assert self.target.length(slot) == len(self.tokens[slot])
        self.assert_alike(list(counts), list(counts.values()), found.last_hidden, found.features)

    def assert_alike(self, slots: list[int], counts: list[int], hidden: Tensor, features: Tensor) -> None:
        width = max(len(self.tokens[s]) for s in slots)
        rows = [self.tokens[s] + [0] * (width - len(self.tokens[s])) for s in slots]
        whole = self.target.read(torch.tensor(rows), self.layers)
        for row, (slot, count) in enumerate(zip(slots, counts, strict=True)):
            end = len(self.tokens[slot])
            for name, found, want in (
                ("last_hidden", hidden, whole.last_hidden),
                ("features", features, whole.features),
            ):
                difference = (found[row, :count] - want[row, end - count : end]).abs().max()
                assert difference < CLOSE, f"{name} of slot {slot}, {count} new of {end}: off by {difference}"


def assert_scripted_steps(target: Target) -> None:
    """Prefill past the window, ragged rounds, rollbacks into the window and before it, single-token steps."""
    sequences = Sequences(target)
    sequences.assert_step({0: 11})
    sequences.assert_step({2: 3})
    sequences.assert_step({0: 4, 2: 5})
    sequences.rollback(0, 0.5)
    sequences.assert_step({2: 1, 0: 3, 5: 8})
    sequences.assert_step({0: 1, 2: 1, 5: 1})
    sequences.rollback(5, 0.3)
    sequences.assert_step({5: 6})
    sequences.assert_step({0: 1})
    sequences.reopen(0)
    sequences.assert_step({0: 2, 5: 4})
