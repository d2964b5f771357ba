"""Vector formats by search through all codes, in float64: the oracle of `deepspec.features.quantise`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def float32(x: float) -> float:
    """The nearest float32."""
    return float(torch.tensor(x, dtype=torch.float64).float())


def e4m3_codes() -> list[tuple[float, bool]]:
    """Every finite e4m3fn number, with whether its mantissa is even: four bits of exponent (bias 7), three
    of mantissa, no infinities, all ones is NaN."""
    found = []
    for code in range(256):
        sign, exponent, mantissa = code >> 7, (code >> 3) & 15, code & 7
        if (exponent, mantissa) == (15, 7):
            continue
        size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        found.append((-size if sign else size, mantissa % 2 == 0))
    return found


def nearest(x: float, codes: Sequence[tuple[float, bool]]) -> float:
    """The closest of the codes; of two as close, the even one."""
    return min(codes, key=lambda c: (abs(c[0] - x), not c[1]))[0]


def naive_int8(vector: Sequence[float]) -> tuple[list[float], float]:
    """(values, scale)."""
    scale = max(float32(max(map(abs, vector)) / 127), 2.0**-126)
    codes = [(float(c), c % 2 == 0) for c in range(-127, 128)]
    return [nearest(float32(x / scale), codes) for x in vector], scale


def naive_fp8(vector: Sequence[float]) -> tuple[list[float], float]:
    """(values, scale); the scale is the least power of two with max|x| <= 448 · scale."""
    largest = max(map(abs, vector))
    scale = 2.0**-126
    if largest > 0:
        power = math.ceil(math.log2(largest / 448)) - 2
        while 448 * 2.0**power < largest:
            power += 1
        scale = max(scale, 2.0**power)
    codes = e4m3_codes()
    return [nearest(x / scale, codes) for x in vector], scale
