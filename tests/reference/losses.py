"""The losses written out plainly, with whole logits and autograd: the oracle of `deepspec.maths.losses`.

Everything is in the dtype it is given; tests give float64. Shapes: N rows, V draft vocabulary, W target
vocabulary, d widths, r Markov rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepspec.maths.head import Head


def plain_logits(hidden: Tensor, head: Head) -> Tensor:
    logits = head.scale * (hidden @ head.weight.T)
    if head.bias is not None:
        logits = logits + head.bias
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits


def plain_terms(
    hidden: Tensor,
    head: Head,
    *,
    labels: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | None = None,
    markov: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Each term of each row, unweighted, and `accept` and `correct`: name -> [N]."""
    logits = plain_logits(hidden, head)
    if markov is not None:
        logits = logits + markov[0] @ markov[1].T
    ids = torch.arange(head.vocab_size, device=logits.device) if head.kept is None else head.kept
    log_p = logits - torch.logsumexp(logits, dim=1, keepdim=True)
    p = log_p.exp()
    best = ids[logits.argmax(1)]
    found: dict[str, Tensor] = {}
    if labels is not None:
        known = (labels[:, None] == ids).any(1) if head.kept is not None else torch.ones_like(labels).bool()
        place = (labels[:, None] == ids).int().argmax(1) if head.kept is not None else labels
        found["ce"] = torch.where(known, -log_p.gather(1, place[:, None]).squeeze(1), log_p[:, 0] * 0)
        found["known"], found["correct"] = known, best == labels
    if teacher_hidden is not None and teacher_head is not None:
        teacher_logits = plain_logits(teacher_hidden, teacher_head).detach()
        full = torch.softmax(teacher_logits, dim=1)
        t, p_full = full, p.detach()
        if head.kept is not None:
            t = full[:, ids] / full[:, ids].sum(1, keepdim=True)
            p_full = torch.zeros_like(full)
            p_full[:, ids] = p.detach()
        found["kl"] = -(t * log_p).sum(1)
        found["l1"] = (p - t).abs().sum(1)
        found["reverse_kl"] = (p * (log_p - t.log())).sum(1)
        overlap = torch.minimum(p, t).sum(1)
        found["lk_alpha"] = -overlap.log()
        share = torch.exp(-3 * overlap.detach())
        found["lk_lambda"] = share * found["kl"] + (1 - share) * (1 - overlap)
        found["accept"] = 1 - 0.5 * (p_full - full).abs().sum(1)
        found["correct"] = best == teacher_logits.argmax(1)
    return found


def plain_confidence_loss(logits: Tensor, accept: Tensor, weights: Tensor) -> Tensor:
    c = torch.sigmoid(logits)
    return -(weights * (accept * c.log() + (1 - accept) * (1 - c).log())).sum()


def plain_block_weights(
    rule: str, found: dict[str, Tensor], block: Tensor, place: Tensor, alpha: float = 0.5
) -> Tensor:
    """Weights by position, one row after the other: `survival` from `accept`, `dpace` from `ce`."""
    rate = found["accept"].detach() if rule == "survival" else (1 - alpha) * chance_of(found) + alpha
    rates = {key: rate[i] for i, key in enumerate(zip(block.tolist(), place.tolist(), strict=True))}
    last = max((at for _, at in rates), default=0)

    def survives(own: int, length: int) -> Tensor:
        """The product of the first `length` rates of a block; a position without a row ends it."""
        return torch.stack([rates.get((own, at), rate.new_zeros(())) for at in range(length)]).prod()

    weights = []
    for own, at in rates:
        if rule == "survival":
            weights.append(survives(own, at) if at else rate.new_ones(()))
        else:
            weights.append(sum(survives(own, length) for length in range(at + 1, last + 2)))
    return torch.stack(weights) if weights else rate


def chance_of(found: dict[str, Tensor]) -> Tensor:
    """The probability of the label; none if the draft cannot propose it."""
    return torch.where(found["known"], (-found["ce"]).exp(), torch.zeros_like(found["ce"])).detach()
