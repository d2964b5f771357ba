"""Formats of a feature cache: exactly the nearest code, one scale per vector, bounds that hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.features.formats import STORED_BYTES, vector_bytes
from deepspec.features.quantise import FORMATS, dequantise, largest_of, quantise
from reference.quantise import naive_fp8, naive_int8

NAIVE = {"int8": naive_int8, "fp8": naive_fp8}
NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32)
VECTORS = st.one_of(
    st.lists(NUMBERS, min_size=1, max_size=12),
    # Halves and sixteenths of a scale, which 127 makes 1 for int8: ties are where rounding goes wrong.
    st.lists(st.integers(-2032, 2032).map(lambda n: n / 16), min_size=1, max_size=12).map(
        lambda v: [*v, 127.0]
    ),
    st.lists(st.integers(-448, 448).map(float), min_size=1, max_size=12).map(lambda v: [*v, 448.0]),
)


@pytest.mark.parametrize("form", NAIVE)
@given(vector=VECTORS)
@settings(max_examples=50, deadline=None)
def test_every_element_gets_the_nearest_code_ties_to_even(form: str, vector: list[float]) -> None:
    stored = quantise(torch.tensor([vector]), form)
    values, scale = NAIVE[form](vector)
    assert stored.scales is not None
    assert not any(vector) or stored.scales.tolist() == [scale]  # of zeros, any will do
    assert stored.values.float().tolist() == [values]


@given(vector=VECTORS)
@settings(max_examples=50, deadline=None)
def test_int8_is_off_by_half_a_scale_at_most(vector: list[float]) -> None:
    x = torch.tensor([vector])
    stored = quantise(x, "int8")
    assert stored.scales is not None
    off = (stored.values.double() * stored.scales.double() - x.double()).abs().max()
    assert off <= 0.5 * float(stored.scales) * (1 + 2**-16)  # x / scale is rounded to float32 first


@given(vector=VECTORS)
@settings(max_examples=50, deadline=None)
def test_fp8_keeps_four_bits_of_every_element(vector: list[float]) -> None:
    x = torch.tensor([vector]).double()
    stored = quantise(x.float(), "fp8")
    assert stored.scales is not None
    off = (stored.values.double() * stored.scales.double() - x).abs()
    assert bool((off <= torch.maximum(x.abs() * 2**-4, stored.scales.double() * 2**-10)).all())


@given(vector=VECTORS)
@settings(max_examples=30, deadline=None)
def test_fp8_comes_back_into_bfloat16_without_another_rounding(vector: list[float]) -> None:
    stored = quantise(torch.tensor([vector]), "fp8")
    assert torch.equal(dequantise(stored, torch.bfloat16).float(), dequantise(stored, torch.float32))


def test_bf16_gives_a_bfloat16_targets_numbers_back_bit_for_bit() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)
    found = dequantise(quantise(every, "bf16"), torch.bfloat16)
    assert torch.equal(found.view(torch.int16), every.view(torch.int16))


@pytest.mark.parametrize("form", FORMATS)
def test_a_loud_vector_does_not_drown_a_quiet_one(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    quiet, loud = torch.randn(2, 64, generator=generator) * torch.tensor([[1e-3], [1e4]])
    together = dequantise(quantise(torch.stack([quiet, loud]), form), torch.float32)
    alone = dequantise(quantise(quiet[None], form), torch.float32)
    assert torch.equal(together[:1], alone)
    assert (together[0] - quiet).norm() / quiet.norm() < 0.04


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_the_largest_of_a_vector_shows_whether_all_of_it_is_finite(bad: float, dtype: torch.dtype) -> None:
    vectors = torch.tensor([[1.0, -3.0], [-0.5, 0.25], [bad, 0.0], [0.0, bad]]).to(dtype)
    assert largest_of(vectors)[:2].tolist() == [3.0, 0.5]
    assert largest_of(vectors).isfinite().tolist() == [True, True, False, False]


@pytest.mark.parametrize("form", FORMATS)
def test_zeros_stay_zeros(form: str) -> None:
    assert dequantise(quantise(torch.zeros(2, 8), form), torch.float32).tolist() == [[0.0] * 8] * 2


@pytest.mark.parametrize("form", FORMATS)
def test_bytes_of_a_vector_are_what_is_stored(form: str) -> None:
    assert [*FORMATS] == [*STORED_BYTES]
    stored = quantise(torch.randn(3, 40), form)
    assert sum(part.nbytes for part in stored if part is not None) == 3 * vector_bytes(40, form)
