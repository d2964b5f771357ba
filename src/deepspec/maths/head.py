"""The vocabulary head and the embedding that a draft borrows from its target.

Shapes: N rows of hidden states; d hidden width; V rows of this head; K kept ids (V = K if the vocabulary is
reduced).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Head:
    """A frozen linear head, with the scale and the soft-cap that some model families put around it.

    weight: [V, d]. bias: [V] or None. scale multiplies the matrix product, before the bias.
    softcap: c > 0 bounds logits to (-c, c) as c * tanh(x / c) (Gemma 2, section 2), or None.
    kept: for a reduced vocabulary, [V] int64 distinct target ids, one for each row of `weight`; None if
    row i is target id i.

    Raises ValueError if shapes do not fit each other or the soft-cap is not positive.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    kept: Tensor | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 2:
            raise ValueError(f"head weight must be [V, d], not {tuple(self.weight.shape)}")
        rows = self.weight.shape[0]
        if self.bias is not None and self.bias.shape != (rows,):
            raise ValueError(f"head bias must be [{rows}], not {tuple(self.bias.shape)}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"soft-cap must be positive, not {self.softcap}")
        if self.kept is not None and (self.kept.shape != (rows,) or self.kept.dtype != torch.int64):
            raise ValueError(f"kept ids must be [{rows}] int64, one for each row of the head")

    @property
    def vocab_size(self) -> int:
        """Rows of this head: the number of logits that `logits` returns."""
        return self.weight.shape[0]

    def reduced(self, kept: Sequence[int]) -> Head:
        """The rows of some target ids as a head of its own."""
        ids = torch.tensor(list(kept), device=self.weight.device)
        return replace(
            self, weight=self.weight[ids], bias=None if self.bias is None else self.bias[ids], kept=ids
        )

    def to(self, dtype: torch.dtype) -> Head:
        """The same head with its weight in another dtype."""
        return replace(self, weight=self.weight.to(dtype))

    def rows_of(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Target ids [N] -> (their rows of this head [N], 0 if they have none; whether they have one [N])."""
        if self.kept is None:
            known = (ids >= 0) & (ids < self.vocab_size)
            return ids.masked_fill(~known, 0).long(), known
        order = torch.argsort(self.kept)
        kept = self.kept[order]
        place = torch.searchsorted(kept, ids.long()).clamp(max=self.vocab_size - 1)
        known = kept[place] == ids
        return order[place].masked_fill(~known, 0), known

    def spread(self, logits: Tensor, vocab_size: int) -> Tensor:
        """[..., K] logits of the kept rows -> [..., vocab_size] over target ids, -inf for the others.

        From here on, proposals and their distributions are in target ids, and only the head knows that its
        vocabulary is reduced. Logits of a full vocabulary come back as they are.
        """
        if self.kept is None:
            return logits
        full = logits.new_full((*logits.shape[:-1], vocab_size), float("-inf"))
        return full.index_copy_(-1, self.kept, logits)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., V] in the dtype of `hidden`: softcap(scale * hidden @ weight.T + bias).

        A Markov bias is not part of the head; it is added to what this returns, after the soft-cap.
        """
        product = torch.matmul(hidden, self.weight.to(hidden.dtype).t())
        if self.scale != 1.0:
            product = product * self.scale
        if self.bias is not None:
            product = product + self.bias.to(product.dtype)
        if self.softcap is not None:
            product = self.softcap * torch.tanh(product / self.softcap)
        return product

    def logits_into(self, out: Tensor, hidden: Tensor, slope: Tensor | None = None) -> None:
        """`logits` of [N, d] rows, in the weight's dtype, written to `out` [N, V].

        Everything after the product is done in the dtype of `out`. slope: [N, V], receives the derivative of
        the soft-cap.
        """
        if hidden.dtype == out.dtype:
            torch.mm(hidden, self.weight.t(), out=out)
        elif out.device.type == "cuda":
            # The product's own float32 sums, not rounded to the narrow dtype first.
            torch.mm(hidden, self.weight.t(), out_dtype=out.dtype, out=out)
        else:
            out.copy_(hidden @ self.weight.t())
        if self.scale != 1.0:
            out.mul_(self.scale)
        if self.bias is not None:
            out.add_(self.bias)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_()
            if slope is not None:
                torch.mul(out, out, out=slope).neg_().add_(1.0)
            out.mul_(self.softcap)


@dataclass(frozen=True, eq=False)
class Embedding:
    """The target's frozen token embedding [V, d], and the factor some families put on its output."""

    weight: Tensor
    scale: float = 1.0

    def __call__(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.weight)
        # The factor is rounded to the weights' dtype first, as the target does.
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale, dtype=rows.dtype)
