"""Heads of a block draft: the sequential (Markov) head and the confidence head (method.md 3).

[...] leading dimensions, γ slots, V vocabulary, K rows of the draft's head (V, or fewer if its vocabulary is
reduced), r Markov rank, d hidden width.
A new sequential head is a subclass with its own `step`, and a line in `MARKOV_HEADS` (`drafts/__init__.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TABLES = ("markov_w1.weight", "markov_w2.weight")
"""How the names of weights end that have a row for each token."""


class MarkovHead(nn.Module):
    """The `vanilla` head: a bias over the vocabulary that depends only on the previous token.

    z = W1[previous]. The bias W2 z is added to the base logits after the soft-cap.
    """

    def __init__(self, vocab_size: int, rank: int, hidden: int, head_rows: int | None = None) -> None:
        super().__init__()
        self.rank = rank
        self.markov_w1 = nn.Embedding(vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, head_rows or vocab_size, bias=False)

    def start(self, embedded: Tensor) -> Tensor | None:
        """The state before the first slot, or None if the head keeps none. embedded: [..., r]."""
        return None

    def step(self, embedded: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(z [..., r], new state) of one slot. embedded: W1[previous] [..., r]; hidden: [..., d]."""
        return embedded, None

    def forward(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """z [..., γ, r] of all slots in training, from W1[previous] of the true previous tokens [..., γ, r]
        and the hidden rows [..., γ, d]."""
        state = self.start(embedded[..., 0, :])
        if state is None:
            return self.step(embedded, hidden, None)[0]
        outputs = []
        for slot in range(embedded.shape[-2]):
            z, state = self.step(embedded[..., slot, :], hidden[..., slot, :], state)
            outputs.append(z)
        return torch.stack(outputs, dim=-2)


class GatedMarkovHead(MarkovHead):
    """The `gated` head: z = sigmoid(Wg [h ; W1[previous]] + b) * W1[previous]."""

    def __init__(self, vocab_size: int, rank: int, hidden: int, head_rows: int | None = None) -> None:
        super().__init__(vocab_size, rank, hidden, head_rows)
        self.gate_proj = nn.Linear(hidden + rank, rank)

    def step(self, embedded: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gate = torch.sigmoid(self.gate_proj(torch.cat([hidden, embedded], dim=-1)))
        return gate * embedded, None


class RecurrentMarkovHead(MarkovHead):
    """The `rnn` head: a gated state that runs over the slots of a block; z = tanh(output)."""

    def __init__(self, vocab_size: int, rank: int, hidden: int, head_rows: int | None = None) -> None:
        super().__init__(vocab_size, rank, hidden, head_rows)
        self.joint_proj = nn.Linear(2 * rank + hidden, 3 * rank)

    def start(self, embedded: Tensor) -> Tensor:
        return torch.zeros_like(embedded)

    def step(self, embedded: Tensor, hidden: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert state is not None
        gate, candidate, output = self.joint_proj(torch.cat([state, embedded, hidden], dim=-1)).chunk(3, -1)
        gate = torch.sigmoid(gate)
        return torch.tanh(output), gate * state + (1 - gate) * torch.tanh(candidate)


class ConfidenceHead(nn.Module):
    """The logit of the probability that a slot's token is accepted, given that all tokens before it were."""

    def __init__(self, hidden: int, rank: int, with_markov: bool) -> None:
        super().__init__()
        self.with_markov = with_markov
        self.proj = nn.Linear(hidden + (rank if with_markov else 0), 1)

    def forward(self, hidden: Tensor, embedded: Tensor | None) -> Tensor:
        """Logits [...] from hidden rows [..., d] and, if the head sees the previous token, W1[previous]
        [..., r]."""
        if self.with_markov:
            assert embedded is not None
            hidden = torch.cat([hidden, embedded], dim=-1)
        return F.linear(hidden, self.proj.weight.to(hidden.dtype), self.proj.bias.to(hidden.dtype)).squeeze(
            -1
        )


def confidence_loss(logits: Tensor, accept: Tensor, weights: Tensor) -> Tensor:
    """Summed binary cross-entropy of confidence logits [N] against acceptance [N] in [0, 1], in nats.

    Weighted by weights [N]; rows of weight zero are left out whatever they hold. `accept` is a label: no
    gradient flows into it (DSpark, section 3.2). Returns a float32 scalar.
    """
    counted = weights != 0
    safe_logits = torch.where(counted, logits, torch.zeros_like(logits)).float()
    safe_accept = torch.where(counted, accept.detach(), torch.zeros_like(accept)).float()
    return F.binary_cross_entropy_with_logits(safe_logits, safe_accept, weights.float(), reduction="sum")
