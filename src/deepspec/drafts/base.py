"""The interface that every draft has: what it proposes (`Proposal`), what its loss is (`LossSums`), and the
slots that decoding drives it by.

R rows, Q observed tokens per row, γ proposals, V vocabulary, m captured layers, d hidden width, N loss rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from deepspec.drafts import ALGORITHMS, Algorithm
from deepspec.drafts.layers import lean_layers
from deepspec.drafts.spec import DraftSpec
from deepspec.maths.blocks import FeatureBatch
from deepspec.maths.head import Embedding, Head
from deepspec.maths.lean import LeanLayers
from deepspec.maths.slots import Ints, Ragged, Rows, SlotStore
from deepspec.maths.verify import Sampling, Samplings, draw, most_probable, warp


class LossSums(NamedTuple):
    """A numerator and its denominator, both summable over batches and ranks; the loss is
    total / (weight + 1e-6). `metrics`: detached sums, in pairs `name_num`, `name_den`, and loss terms."""

    total: Tensor
    weight: Tensor
    metrics: dict[str, Tensor]


class Proposal(NamedTuple):
    """tokens [R, γ]; q [R, γ, V], exactly the float32 distributions they were drawn from;
    confidence logits [R, γ], known before the token of their position was drawn, or None: a draft without
    such a head has them only if it is `scored`."""

    tokens: Tensor
    q: Tensor
    confidence: Tensor | None


class Draft(Protocol):
    """What decoding, calibration, scheduling and serving know of an algorithm: nothing else."""

    name: str

    @property
    def max_proposals(self) -> int:
        """γ: the most tokens one `propose` gives."""

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Target layers to capture; empty when it needs none."""

    def open(self, slot: int) -> None:
        """Start a sequence in a slot, forgetting whatever was there."""

    def free(self, slot: int) -> None:
        """Forget an opened slot's sequence: its row has finished or was cancelled."""

    def observe(self, slots: Ints, features: Tensor | None, tokens: Ragged, next_tokens: Ragged) -> None:
        """Take in committed tokens: features [R, Q, m*d] (padded) of `tokens`, each followed by
        `next_tokens`."""

    def propose(self, slots: Ints, anchors: Ints, samplings: Samplings, uniforms: Tensor) -> Proposal:
        """γ tokens after each row's anchor, its last committed token, drawn by each row's own sampling.

        samplings: one per row, or one for all. uniforms: [R, γ] in [0, 1).
        """


class NeuralDraft(nn.Module, Draft):
    """What the trained drafts share: their spec, what they borrow from the target, their slots."""

    embedding: Embedding
    head: Head
    teacher_head: Head
    """The target's head: turns last hidden states into the target's distribution."""
    frequencies: Tensor
    layers: nn.ModuleList
    norm: nn.RMSNorm
    """After the last layer."""
    fc: nn.Linear
    """Projects the features of all captured layers to the hidden width."""

    def __init__(self, spec: DraftSpec) -> None:
        super().__init__()
        self.spec = spec
        self.name = spec.algorithm
        self.stores: list[SlotStore] = []
        """Of each layer's keys and values."""
        self.lean: LeanLayers | None = None
        """The layers for decoding in few operations; None while weights may change (`settle`)."""
        self.lengths: dict[int, int] = {}
        """Committed tokens per slot."""
        self.scored = False
        """Whether a draft without a confidence head gives `log_odds` of its distributions as confidences."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Casts and moves of the whole module; rotary frequencies move, but stay float32 whatever the rest
        becomes (rounded to bfloat16 they turn far positions wrongly)."""
        self.lean = None
        before = self.frequencies
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if not before.is_meta and self.frequencies.dtype != before.dtype:
            self.frequencies = before.to(self.frequencies.device)
        return self

    def bind(self, embedding: Embedding, head: Head, teacher_head: Head | None = None) -> None:
        """Lend the target's embedding and head. `head` may be the draft's own, where a checkpoint brings
        another; `teacher_head` is then the target's, for the loss.

        They are not modules, so neither optimisers nor sharding nor the state dict see their weights."""
        self.embedding, self.head, self.teacher_head = embedding, head, teacher_head or head

    def settle(self) -> None:
        """Prepare to decode with weights that do not change until training starts or others are loaded."""
        if not self.stores:
            return
        layers: list[Any] = list(self.layers)
        self.lean = lean_layers(layers, self.norm, self.stores, self.spec.shape, self.frequencies)

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.lean = None
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        if requires_grad:
            self.lean = None
        return super().requires_grad_(requires_grad)

    def load_state_dict(self, *given: Any, **how: Any) -> Any:
        self.lean = None
        return super().load_state_dict(*given, **how)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def algorithm(self) -> Algorithm:
        return ALGORITHMS[self.spec.algorithm]

    @property
    def max_proposals(self) -> int:
        return self.spec.proposals

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return self.spec.target_layer_ids

    def open(self, slot: int) -> None:
        self.lengths[slot] = 0
        for store in self.stores:
            store.wipe(slot, 0)  # NaN of an earlier sequence would pass through any mask

    def free(self, slot: int) -> None:
        del self.lengths[slot]

    def release(self) -> None:
        """Give back the memory of all slots, none of which may be in use."""
        for store in self.stores:
            store.release()

    def rows(self, slots: Ints, width: int) -> Rows:
        """Where the next `width` tokens of each slot go."""
        return Rows(tuple(slots), tuple(self.lengths[s] for s in slots), width)

    def plan(self, batch: FeatureBatch, num_anchors: int, generator: torch.Generator | None) -> Any:
        """What `forward` learns from in this batch, such as drawn anchors; None for every position."""
        return None


def log_odds(logits: Tensor) -> Tensor:
    """[...] log(p / (1 - p)) of the likeliest token under logits [..., V], before sampling changes them: what
    a draft without a confidence head knows of its chances before a token is drawn."""
    others = (logits.float() - logits.amax(-1, keepdim=True)).exp().sum(-1) - 1
    return -others.clamp_min(1e-12).log()


def choose(logits: Tensor, samplings: Samplings, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token from each of logits [R, ..., V], row r by the r-th sampling (a single one is for all).

    uniforms: [R, ...] in [0, 1). Returns the tokens [R, ...] and the distributions [R, ..., V] that they
    were drawn from.
    """
    if samplings.greedy if isinstance(samplings, Sampling) else all(s.greedy for s in samplings):
        return most_probable(logits)
    q = warp(logits, samplings)
    return draw(q, uniforms), q


def tau_sums(accept: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Expected accepted length with bonus, from acceptance rates [..., γ] of consecutive slots:
    1 + sum_j prod_{i<=j} accept_i over blocks with a valid slot, and how many such blocks."""
    survive = (accept * valid).cumprod(-1).sum(-1)
    counted = valid[..., 0] > 0
    return {"tau_num": ((1 + survive) * counted).sum(), "tau_den": counted.sum()}
