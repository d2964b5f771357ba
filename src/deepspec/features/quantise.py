"""The number formats of a feature cache: bfloat16 as it is, fp8 and int8 with one scale per vector.

d is the width of a vector. A vector is one token's output of one layer: features grow by orders of magnitude
from layer to layer and on a text's first tokens, so a scale shared by either would drown the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deepspec.maths.finite import largest_of

FORMATS = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
E4M3_MAX, INT8_MAX = 448.0, 127.0
SMALLEST = 2.0**-126
"""The least scale, which is the least normal float32. Smaller vectors come out as zeros, near enough."""


class Stored(NamedTuple):
    """values [..., d] in a format's dtype; scales [...] float32, None for bf16: vector = values · scale."""

    values: Tensor
    scales: Tensor | None


def quantise(vectors: Tensor, form: str) -> Stored:
    """Finite vectors [..., d] in a format of FORMATS, rounded to nearest, ties to even.

    int8: scale = max|x| / 127, so an element is off by at most half a scale (plus float32 rounding).
    fp8: the scale is a power of two that brings max|x| into (224, 448], so scaling itself is exact and an
    element keeps four significant bits: it is off by at most 2⁻⁴ of itself, or, below 2⁻⁶ scales, by at most
    2⁻¹⁰ scales. bf16: exactly x.bfloat16(), which is x itself for a bfloat16 target.
    """
    if form == "bf16":
        return Stored(vectors.to(torch.bfloat16), None)
    # In place from here on: at these widths memory is what costs time.
    x, largest = vectors.to(torch.float32, copy=True), largest_of(vectors).float()
    if form == "int8":
        scales = (largest / INT8_MAX).clamp(min=SMALLEST)
        return Stored(x.div_(scales[..., None]).round_().to(torch.int8), scales)
    # largest = m · 2^e with m in [0.5, 1), and 448 = 0.875 · 2^9.
    mantissa, exponent = torch.frexp(largest)
    exponent = exponent + (mantissa > E4M3_MAX / 512).to(exponent.dtype) - 9
    scales = torch.ldexp(torch.ones_like(largest), exponent).clamp(min=SMALLEST)
    return Stored(x.div_(scales[..., None]).to(torch.float8_e4m3fn), scales)


def dequantise(stored: Stored, dtype: torch.dtype) -> Tensor:
    """[..., d] in `dtype`. From fp8 the product is exact in bfloat16 too: four bits times a power of two."""
    if stored.scales is None:
        return stored.values.to(dtype)
    return stored.values.float().mul_(stored.scales[..., None]).to(dtype)
