"""Calibration: the errors, the temperatures, and what `deepspec calibrate` makes of a draft's rounds."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import prompts_of, tiny_draft
from deepspec.decode.engine import Decoder
from deepspec.drafts.base import log_odds
from deepspec.errors import DataError, MismatchError, UserError
from deepspec.maths import calibration as ours
from deepspec.maths.verify import Sampling
from deepspec.measure import calibrate as measure
from deepspec.measure.rows import Prompt
from deepspec.targets import Target
from reference import calibration as reference

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
        low, high = ours.bootstrapped_error(sums[:, None], seed=0)
        error = float(ours.calibration_error(sums.sum(0)))
        assert low <= error <= high
        widths.append(high - low)
    assert widths[1] < widths[0]


def test_no_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="without rounds"):
        ours.fit_temperatures(torch.zeros(0, 3), torch.zeros(0))


def test_an_error_that_chance_explains_is_called_so() -> None:
    logits, accepted = drawn(4, 300, 3)
    outcomes, survivals = ours.survived(accepted, 3), ours.survivals(logits)
    errors = [
        float(ours.calibration_error(ours.binned(survivals[:, k], outcomes[:, k]))[0]) for k in range(3)
    ]
    assert sum(errors) / 3 == pytest.approx(ours.noise(logits, 0), rel=0.5)
    assert ours.noise(logits.repeat(100, 1), 0) < ours.noise(logits, 0) / 5


def test_log_odds_are_those_of_the_likeliest_token() -> None:
    logits = torch.randn(4, 3, 17, generator=torch.Generator().manual_seed(0)).double() * 4
    likeliest = logits.softmax(-1).amax(-1)
    torch.testing.assert_close(log_odds(logits).double(), likeliest.logit(), atol=1e-4, rtol=1e-4)
    assert log_odds(torch.tensor([0.0, -torch.inf])).isfinite()


# ── the rounds of a draft ─────────────────────────────────────────────────────────────────────────────


def tasks(target: Target, domains: tuple[str, ...]) -> list[Prompt]:
    found = prompts_of(target, [6, 9, 5, 8] * 6)
    return [Prompt(str(i), domains[i % len(domains)], "", tuple(ids)) for i, ids in enumerate(found)]


@pytest.mark.parametrize("algorithm", ["eagle3", "dflash", "dspark"])
def test_report_counts_every_round_once(targets: dict[str, Target], algorithm: str, tmp_path: Path) -> None:
    target = targets["llama"]
    prompts = tasks(target, ("code", "chat"))
    out = tmp_path / "calibration.json"
    report = measure.calibrate(
        target, tiny_draft(target, algorithm), prompts, Sampling(1.0), max_new_tokens=16, out=out
    )
    assert json.loads(out.read_text("utf-8")) == report
    assert list(tmp_path.iterdir()) == [out], "the partial file is gone"
    rounds, block = report["rounds"], report["block"]
    assert report["positions"][0]["reached"] == rounds
    assert sum(part["rounds"] for part in report["held_out"].values()) == rounds
    assert sum(part["rounds"] for part in report["depth"].values()) == rounds
    assert len(report["temperatures"]) == len(report["positions"]) == block
    assert set(report["held_out"]) == {"code", "chat"}
    assert report["score"].startswith("confidence" if algorithm == "dspark" else "log-odds")


def test_one_domain_is_held_out_by_halves_of_its_prompts(targets: dict[str, Target]) -> None:
    target = targets["llama"]
    report = measure.calibrate(
        target, tiny_draft(target, "dflash"), tasks(target, ("all",)), Sampling(1.0), max_new_tokens=16
    )
    assert list(report["held_out"]) == ["all, half 1", "all, half 2"]


def test_a_killed_calibration_continues_to_the_same_report(
    targets: dict[str, Target], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, made = targets["llama"], []
    prompts, draft = tasks(target, ("code", "chat")), tiny_draft(target, "dspark")
    out = tmp_path / "calibration.json"
    options = {"max_new_tokens": 16, "out": out}
    whole = measure.calibrate(target, draft, prompts, Sampling(1.0), **options)
    usual = measure.ResumableLog.write

    def killed(self: measure.ResumableLog, record: dict) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(record)
        usual(self, record)

    monkeypatch.setattr(measure.ResumableLog, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        measure.calibrate(target, draft, prompts, Sampling(1.0), **options)
    monkeypatch.undo()
    again = measure.calibrate(target, draft, prompts, Sampling(1.0), **options)
    assert again | {"created": ""} == whole | {"created": ""}


def test_too_few_rounds_or_prompts_are_refused(
    targets: dict[str, Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, draft = targets["llama"], tiny_draft(targets["llama"], "dspark")
    prompts = tasks(target, ("a",))
    with pytest.raises(DataError, match="too few"):
        measure.calibrate(target, draft, prompts[:2], Sampling(1.0), max_new_tokens=8)
    monkeypatch.setattr(measure, "LEAST_ROUNDS", 2)
    with pytest.raises(DataError, match="all rounds are of one prompt"):
        measure.calibrate(target, draft, prompts[:1], Sampling(1.0), max_new_tokens=16)


def test_temperatures_are_those_of_this_draft_or_refused(targets: dict[str, Target], tmp_path: Path) -> None:
    target, draft = targets["llama"], tiny_draft(targets["llama"], "dspark")
    out = tmp_path / "calibration.json"
    report = measure.calibrate(
        target, draft, tasks(target, ("a",)), Sampling(1.0), max_new_tokens=16, out=out
    )
    found = measure.temperatures_of(out, draft)
    assert found == report["temperatures"]
    with pytest.raises(UserError, match=r"3 temperatures for a draft that proposes \d tokens"):
        Decoder(target, tiny_draft(target, "dspark", block=4), temperatures=found[:3])
    with pytest.raises(MismatchError, match="its weights or its number format"):
        measure.temperatures_of(out, tiny_draft(target, "dspark", seed=1))
    for text in ("[]", "{}", json.dumps(report | {"temperatures": [0.0] * 7}), "{"):
        out.write_text(text)
        with pytest.raises(DataError, match="not a report of `deepspec calibrate`"):
            measure.temperatures_of(out, draft)


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
    report = measure.report_of(
        measure.Rounds(logits, accepted, torch.arange(2000), torch.ones(2000).long(), ["a", "b"] * 1000)
    )
    table = json.dumps(measure.sglang_table(report, "held out"))
    read = sys.modules["sglang.srt.speculative.dspark_components.dspark_sts"].DSparkStsCalibration
    assert read.from_json(table).temperatures == report["temperatures"]
