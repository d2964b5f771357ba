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
        found["cross"] = log_total - torch.mul(t, logits, out=logits).sum(1)
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
    p: Tensor,
    t: Tensor | None,
    slopes: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    labels: Tensor | None,
    ratio: Tensor | None,
) -> None:
    """The gradient by the logits [b, V] into `out`; p appears in every direction, so its factors are gathered
    into one per row. The rest as `read_figures` took and left it."""
    of_p = sum((slopes[name] for name in ("label", "teacher") if name in slopes), torch.zeros_like(p[:, :1]))
    wide: list[tuple[Tensor, Tensor]] = []
    if t is not None and "overlap" in slopes:
        below = torch.lt(p, t, out=out)
        wide.append((below, slopes["overlap"]))
        of_p = of_p - slopes["overlap"] * _dots(p, below)[:, None]
    if ratio is not None and "ratio" in slopes:
        wide.append((ratio, slopes["ratio"]))
        of_p = of_p - slopes["ratio"] * found["reverse"][:, None]
    factors = of_p
    for values, slope in wide:
        factors = torch.addcmul(factors, values, slope, out=out)
    torch.mul(p, factors, out=out)
    if t is not None and "teacher" in slopes:
        out.addcmul_(t, slopes["teacher"], value=-1.0)
    if labels is not None and "label" in slopes:
        out.scatter_add_(1, labels, -slopes["label"])


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """[b] of [b, V] twice: the sums of left x right. On a CPU, one-row products take twice the time."""
    if left.device.type == "cpu":
        return (left * right).sum(1)
    return torch.bmm(left[:, None], right[..., None]).flatten()
