"""The figures and directions of `terms.py` for a block of rows, computed from logits.

b rows of one block; V vocabulary of the draft's head. What is as wide as V is written into tensors that the
caller lends, so that on a CPU a block stays in the cache.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from deepspec.maths.terms import TERMS


def read_figures(
    names: Collection[str],
    logits: Tensor,
    p: Tensor,
    log_total: Tensor,
    t: Tensor | None,
    labels: Tensor | None,
    ratio: Tensor | None,
) -> dict[str, Tensor]:
    """The wanted figures [b] of rows. Logits [b, V] are overwritten.

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
        found["cross"] = log_total - _dots(t, logits, logits)
    if "overlap" in names:
        found["overlap"] = torch.minimum(p, t, out=logits).sum(1).clamp_(least, 1.0)
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
    of_p = sum((slopes[name] for name in ("label", "teacher") if name in slopes), torch.zeros_like(p[:, :1]))
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
    if told is not None and labels is not None:
        out.scatter_(1, labels, told.to(out.dtype))


def largest(values: Tensor) -> tuple[Tensor, Tensor | None]:
    """([b] the largest of each row of [b, V], [b] where it is). On a CPU, to say where takes another pass:
    None."""
    return (values.amax(1), None) if on_cpu(values) else tuple(values.max(1))  # type: ignore[return-value]


def _dots(left: Tensor, right: Tensor, spare: Tensor | None = None) -> Tensor:
    """[b] of [b, V] twice: the sums of left x right. On a CPU, one-row products take twice the time. spare:
    [b, V], for all products there."""
    if on_cpu(left):
        return torch.mul(left, right, out=spare).sum(1)
    return torch.bmm(left[:, None], right[..., None]).flatten()


def on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"
