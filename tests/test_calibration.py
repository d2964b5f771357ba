"""Calibration: the errors, the temperatures, and what `deepspec calibrate` makes of a draft's rounds."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec.maths import calibration as ours
from tests.reference import calibration as reference

rounds = st.integers(0, 2**32 - 1)


def drawn(seed: int, count: int, block: int, slope: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [N, γ] and accepted counts that follow them, if `slope` is 1."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, block, generator=random, dtype=torch.float64) * 1.5 + 0.8
    taken = torch.rand(count, block, generator=random, dtype=torch.float64) < (logits * slope).sigmoid()
    return logits, taken.cumprod(-1).sum(-1)


@settings(max_examples=40, deadline=None)
@given(rounds, st.integers(1, 40))
def test_error_and_area_equal_plain_loops(seed: int, count: int) -> None:
    random = torch.Generator().manual_seed(seed)
    p = torch.randint(0, 21, (count,), generator=random).double() / 20  # ties, 0 and 1 included
    y = torch.rand(count, generator=random) < 0.5
    error = float(ours.calibration_error(ours.binned(p, y))[0])
    assert error == pytest.approx(
        reference.expected_calibration_error(p.tolist(), y.tolist(), ours.BINS), abs=1e-12
    )
    area, plain = ours.auc(p, y), reference.area_under_the_curve(p.tolist(), y.tolist())
    assert (area is None) == (plain is None)
    assert area is None or area == pytest.approx(plain, abs=1e-12)


@settings(max_examples=10, deadline=None)
@given(rounds)
def test_temperatures_equal_those_of_plain_loops(seed: int) -> None:
    logits, accepted = drawn(seed, 60, 3, slope=0.5)
    choices = ours.grid()
    plain = reference.sequential_temperatures(logits.tolist(), accepted.tolist(), choices.tolist(), ours.BINS)
    assert ours.fit_temperatures(logits, accepted).tolist() == plain


def test_overconfident_logits_are_scaled_back_to_the_truth() -> None:
    """The truth is the logits halved, so that the temperature is 2 at every position."""
    logits, accepted = drawn(1, 20_000, 4, slope=0.5)
    found = ours.fit_temperatures(logits, accepted)
    assert found.tolist() == pytest.approx([2.0] * 4, rel=0.25)
    outcomes = ours.survived(accepted, 4)
    for k in range(4):
        before, after = (
            float(ours.calibration_error(ours.binned(ours.survivals(logits, t)[:, k], outcomes[:, k]))[0])
            for t in (None, found)
        )
        assert after < 0.02 < before


def test_temperatures_leave_the_order_at_each_position_alone() -> None:
    logits, accepted = drawn(2, 500, 3, slope=0.5)
    outcomes, found = ours.survived(accepted, 3), ours.fit_temperatures(logits, accepted)
    for k in range(3):
        assert ours.auc(logits[:, k], outcomes[:, k]) == ours.auc(logits[:, k] / found[k], outcomes[:, k])


def test_interval_of_the_error_holds_it_and_narrows_with_prompts() -> None:
    logits, accepted = drawn(3, 4000, 1, slope=0.5)
    p, y = ours.survivals(logits)[:, 0], ours.survived(accepted, 1)[:, 0]
    widths = []
    for prompts in (20, 200):
        some = slice(0, prompts * 20)
        sums = ours.binned(p[some], y[some], torch.arange(prompts).repeat_interleave(20))
        low, high = ours.bootstrapped_error(sums, seed=0)
        error = float(ours.calibration_error(sums.sum(0)))
        assert low <= error <= high
        widths.append(high - low)
    assert widths[1] < widths[0]


def test_no_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="without rounds"):
        ours.fit_temperatures(torch.zeros(0, 3), torch.zeros(0))


def sglang(path: str, name: str) -> types.ModuleType:
    """A file of an unpacked SGLang wheel, loaded alone: the package itself needs a GPU's libraries."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif("DEEPSPEC_SGLANG" not in os.environ, reason="DEEPSPEC_SGLANG names no unpacked wheel")
def test_temperatures_equal_those_of_sglangs_fitter() -> None:
    root = Path(os.environ["DEEPSPEC_SGLANG"]) / "sglang"
    sts = root / "srt" / "speculative" / "dspark_components" / "dspark_sts.py"
    sglang(str(sts), "sglang.srt.speculative.dspark_components.dspark_sts")
    fitter = sglang(str(root / "benchmark" / "dspark_sts_fit.py"), "dspark_sts_fit")
    for seed in range(5):
        logits, accepted = drawn(seed, 2000, 7, slope=0.6)
        theirs = fitter.fit_sts_temperatures(
            logits=logits, prefix_mask=ours.survived(accepted, 7), grid=fitter.default_temperature_grid()
        )
        assert ours.fit_temperatures(logits, accepted).tolist() == theirs["temperatures"]
