"""Whether numbers are finite, in as few passes over them as will do.

m captured layers, d hidden.
"""

from __future__ import annotations

from torch import Tensor, maximum


def largest_of(vectors: Tensor) -> Tensor:
    """[...] max|x| of vectors [..., d]; not finite exactly where one of a vector's elements is not.

    Two reductions: on a CPU they take a tenth of the time of abs, isfinite or a norm.
    """
    return maximum(vectors.amax(-1), -vectors.amin(-1))


def finite_layers(features: Tensor, layers: int) -> Tensor:
    """[..., m] bool: which of the m vectors in features [..., m*d] are finite."""
    return largest_of(features.unflatten(-1, (layers, -1))).isfinite()
