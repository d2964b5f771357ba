"""The figures and directions of `terms.py` for a block of rows, computed from logits.

b rows of one block; V vocabulary of the draft's head. What is as wide as V is written into tensors that the
caller lends, so that on a CPU a block stays in the cache. A compiler needs none of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from deepspec.maths.fused import fused
from deepspec.maths.terms import TERMS


class Scratch(NamedTuple):
    """What a block is computed in, [b, V] each: probabilities, a spare one, the block's teachers where they
    are gathered from others, and log(p / t) for `reverse`."""

    p: Tensor
    spare: Tensor
    gathered: Tensor | None
    ratio: Tensor | None


class Judged(NamedTuple):
    """The figures by name [b]; each term's value, not weighted, [b]; best [b]: the largest logit's id, if it
    is wanted; accept [b]: see `HeadLoss`, None without a teacher."""

    found: dict[str, Tensor]
    values: dict[str, Tensor]
    best: Tensor | None
    accept: Tensor | None


@fused
def judge(
    logits: Tensor,
    out: Tensor | None,
    teachers: Tensor | None,
    within: Tensor | None,
    mass: Tensor | None,
    labels: Tensor | None,
    weights: Mapping[str, Tensor],
    names: Collection[str],
    best: bool,
    scratch: Scratch | None,
) -> Judged:
    """Figures, terms and metrics of rows from their logits [b, V], and the gradient of the weighted terms by
    the logits into `out` [b, V], which may be `logits`.

    teachers: probabilities, [b, V], or [n, V] of which row i reads `within[i]`. mass: [b, 1], the share of
    each teacher's full distribution on kept ids; None for a full vocabulary. labels: [b, 1]. weights: term
    -> [b]. names: the wanted figures. scratch: None if a compiler needs none; its spare may be `logits`.
    """
    if scratch is None:
        fresh = partial(torch.empty_like, logits)
        gathered, ratio = None if within is None else fresh(), fresh() if "reverse" in names else None
        scratch = Scratch(fresh(), fresh(), gathered, ratio)
    p, spare, gathered, ratio = scratch
    t = teachers
    if teachers is not None and within is not None:
        t = torch.index_select(teachers, 0, within, out=gathered)
    chosen, log_total = softmax_into(p, logits, best)
    found = read_figures(names, logits, spare, p, log_total, t, labels, ratio)
    accept = found.get("overlap")
    if mass is not None and t is not None:
        accept = torch.minimum(torch.mul(t, mass, out=spare), p, out=spare).sum(1).clamp(0.0, 1.0)
    values = {term: TERMS[term].value(found) for term in weights}
    if out is not None:
        gradient_into(out, spare, p, t, slopes_of(weights, found), found, labels, ratio)
    return Judged(found, values, chosen, accept)


@fused
def teach(logits: Tensor, out: Tensor, best: bool) -> Tensor | None:
    """The distributions of logits [b, V] into `out`, and the ids of the largest, if they are wanted."""
    if on_cpu(logits):
        return softmax_into(out, logits, best)[0]
    torch.softmax(logits, 1, out=out)
    return logits.argmax(1) if best else None


def softmax_into(p: Tensor, logits: Tensor, best: bool) -> tuple[Tensor | None, Tensor]:
    """The softmax of logits [b, V] into `p`: ([b] the place of the largest logit, if it is wanted; [b] the
    logarithms of the sums of exponentials). On a CPU, torch's own softmax takes longer than its parts one by
    one, and to say where the largest is takes a pass of its own."""
    if on_cpu(logits):
        top = logits.amax(1, keepdim=True)
        total = torch.sub(logits, top, out=p).exp_().sum(1, keepdim=True)
        p.mul_(total.reciprocal())
        return logits.argmax(1) if best else None, total.log_().add_(top)[:, 0]
    top, where = logits.max(1)
    torch.softmax(logits, 1, out=p)
    # The largest probability is one over the sum of exponentials of logits less the largest: this is its log.
    return where if best else None, top - p.gather(1, where[:, None])[:, 0].log_()


def read_figures(
    names: Collection[str],
    logits: Tensor,
    spare: Tensor,
    p: Tensor,
    log_total: Tensor,
    t: Tensor | None,
    labels: Tensor | None,
    ratio: Tensor | None,
) -> dict[str, Tensor]:
    """The wanted figures [b] of rows from their logits [b, V]. spare: [b, V], overwritten; may be `logits`.

    p: [b, V] their softmax; log_total: [b] the logarithms of their sums of exponentials; t: [b, V]; labels:
    [b, 1]. ratio: [b, V], receives log(p / t) if `reverse` is wanted. log t is bounded below by the logarithm
    of the smallest normal number (-87 in float32), and the overlap by that number.
    """
    found: dict[str, Tensor] = {}
    if labels is not None and "surprise" in names:
        found["surprise"] = log_total - logits.gather(1, labels).squeeze(1)
    if t is None:
        return found
    least = torch.finfo(t.dtype).tiny
    if ratio is not None and "reverse" in names:
        torch.clamp_min(t, least, out=ratio).log_()
        torch.sub(logits, ratio, out=ratio).sub_(log_total[:, None])
        found["reverse"] = _dots(p, ratio)
    if "cross" in names:
        found["cross"] = log_total - _dots(t, logits, spare)
    if "overlap" in names:
        found["overlap"] = torch.minimum(p, t, out=spare).sum(1).clamp_(least, 1.0)
    return found


def slopes_of(weights: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """direction -> [b, 1], the factors of the weighted terms' gradients. weights: term -> [b]."""
    slopes: dict[str, Tensor] = {}
    for term, weight in weights.items():
        for direction, factor in TERMS[term].slopes.items():
            part = weight[:, None] * (factor(found)[:, None] if callable(factor) else factor)
            slopes[direction] = slopes[direction] + part if direction in slopes else part
    return slopes


def gradient_into(
    out: Tensor,
    spare: Tensor,
    p: Tensor,
    t: Tensor | None,
    slopes: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    labels: Tensor | None,
    ratio: Tensor | None,
) -> None:
    """The gradient by the logits [b, V] into `out`, whose dtype may be narrower: each number is then rounded
    once, as it is written. spare: [b, V], may be `out` unless that is narrower. p appears in every direction,
    so its factors are gathered into one per row. The rest as `read_figures` took and left it."""
    parts = [slopes[name] for name in ("label", "teacher") if name in slopes]
    of_p = sum(parts[1:], parts[0]) if parts else torch.zeros_like(p[:, :1])
    wide: list[tuple[Tensor, Tensor]] = []
    if t is not None and "overlap" in slopes:
        below = torch.lt(p, t, out=spare)
        wide.append((below, slopes["overlap"]))
        of_p = of_p - slopes["overlap"] * _dots(p, below)[:, None]
    if ratio is not None and "ratio" in slopes:
        wide.append((ratio, slopes["ratio"]))
        of_p = of_p - slopes["ratio"] * found["reverse"][:, None]
    factors = of_p
    for values, slope in wide:
        factors = torch.addcmul(factors, values, slope, out=spare)
    teacher, label = (slopes.get(name) for name in ("teacher", "label"))
    told = None
    if labels is not None and label is not None:
        told = p.gather(1, labels) * factors.expand_as(p).gather(1, labels) - label
        if t is not None and teacher is not None:
            told = told - t.gather(1, labels) * teacher
    if t is None or teacher is None:
        torch.mul(p, factors, out=out)
    else:
        torch.addcmul(torch.mul(p, factors, out=spare), t, teacher, value=-1.0, out=out)
    if told is None or labels is None:
        return
    if torch.compiler.is_compiling():  # a scatter would be a pass of its own
        here = torch.arange(p.shape[1], device=p.device) == labels
        out.copy_(torch.where(here, told.to(out.dtype), out))
    else:
        out.scatter_(1, labels, told.to(out.dtype))


def _dots(left: Tensor, right: Tensor, spare: Tensor | None = None) -> Tensor:
    """[b] of [b, V] twice: the sums of left x right. On a CPU, one-row products take twice the time. spare:
    [b, V], for all products there."""
    if on_cpu(left) or torch.compiler.is_compiling():
        return torch.mul(left, right, out=spare).sum(1)
    return torch.bmm(left[:, None], right[..., None]).flatten()


def on_cpu(x: Tensor) -> bool:
    """Whether x is on a CPU, and operations run one after the other."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
