"""`deepspec verify`: a decoder that follows the law passes, and each wrong one is named."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from typer.testing import CliRunner

from conftest import prompts_of, teach, tiny_draft
from deepspec.cli import app
from deepspec.decode import engine
from deepspec.drafts.base import NeuralDraft
from deepspec.maths.verify import Sampling, Verdict, draw, verify
from deepspec.measure.lossless import LEVEL, Law, check_greedy, check_law, sentences, verdict_of
from deepspec.measure.rows import Prompt
from deepspec.schedule.policies import Threshold
from deepspec.targets import Target


@pytest.fixture(scope="module")
def scene(targets: dict[str, Target]) -> tuple[Target, NeuralDraft, list[Prompt]]:
    target = targets["llama"]
    found = prompts_of(target, [6, 9, 5, 8])
    answers = [g.token_ids for g in engine.generate(target, None, found, 12)]
    rows = [prompt + answer for prompt, answer in zip(found, answers, strict=True)]
    draft = teach(tiny_draft(target, "dspark"), target, rows, steps=12)
    return target, draft, [Prompt(str(i), "all", "", tuple(ids)) for i, ids in enumerate(found)]


def law_of(scene: tuple[Target, NeuralDraft, list[Prompt]], sampling: Sampling, **options) -> Law:
    target, draft, prompts = scene
    return check_law(target, draft, prompts, sampling, 24, None, 24, **{"repeats": 6, "seed": 0, **options})


@pytest.fixture(scope="module")
def law(scene) -> Law:
    """Of the decoder as it is, at temperature 1."""
    return law_of(scene, Sampling(1.0))


def accepts_always(p, q, tokens, lengths, uniforms) -> Verdict:
    return Verdict(lengths, draw(p[:, -1], uniforms[:, -1]))


def replaces_from_p(p, q, tokens, lengths, uniforms) -> Verdict:
    accepted = verify(p, q, tokens, lengths, uniforms).accepted
    return Verdict(accepted, draw(p[torch.arange(len(p)), accepted], uniforms[:, -1]))


def accepts_too_easily(p, q, tokens, lengths, uniforms) -> Verdict:
    return verify(p, q * 0.7, tokens, lengths, uniforms)


def colder(p, q, tokens, lengths, uniforms) -> Verdict:
    """As if the target had another temperature than the one asked for."""
    sharper = p.square() / p.square().sum(-1, keepdim=True)
    return verify(sharper, q, tokens, lengths, uniforms)


@pytest.mark.parametrize("sampling", [None, Sampling(0.8, top_k=8), Sampling(1.0, top_p=0.8)], ids=str)
def test_the_law_holds_for_the_decoder_as_it_is(scene, law, sampling) -> None:
    found = law if sampling is None else law_of(scene, sampling)
    assert found.tokens > 500 and found.proposed > 250
    assert found.holds, (found.surprise.deviations, found.favour.deviations, found.impossible)


@pytest.mark.parametrize(
    ("wrong", "repeats"), [(accepts_always, 1), (replaces_from_p, 4), (accepts_too_easily, 6), (colder, 2)]
)
def test_every_wrong_decoder_is_noticed(scene, wrong: Callable[..., Verdict], repeats, monkeypatch) -> None:
    monkeypatch.setattr(engine, "verify", wrong)
    assert not law_of(scene, Sampling(1.0), repeats=repeats).holds


def test_a_token_that_truncation_forbids_is_counted(scene, monkeypatch) -> None:
    monkeypatch.setattr(engine, "warp", lambda logits, samplings: logits.softmax(-1))
    law = law_of(scene, Sampling(1.0, top_k=4), repeats=1)
    assert law.impossible > 0 and not law.holds


@pytest.mark.parametrize("sampling", [Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.6)], ids=str)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, False), (torch.bfloat16, True)])
def test_a_token_that_rounding_moves_across_the_cut_is_not_held_against_the_decoder(
    sampling, dtype, near
) -> None:
    logits = torch.tensor([[4.0, 3.9375, 3.875, 1.0]], dtype=dtype)
    for token, law in ((2, Law()), (3, Law())):
        law.add(logits, sampling, torch.tensor([token]), logits[:0], torch.tensor([], dtype=torch.long))
        assert (law.near_ties, law.impossible) == ((1, 0) if near and token == 2 else (0, 1))


def test_a_policy_leaves_the_law_alone(scene) -> None:
    target, draft, prompts = scene
    law = check_law(target, draft, prompts, Sampling(1.0), 24, Threshold(0.4), 24, repeats=6, seed=1)
    assert law.holds


def test_stated_power_is_the_power_that_there_is(scene, law, monkeypatch) -> None:
    """A decoder that takes the detectable share of proposals unchecked is noticed, one without is not: the
    expected deviation is the limit and 1.64 more."""
    share = law.detectable
    assert share is not None and 0 < share < 0.5
    coin = torch.Generator().manual_seed(0)

    def careless(p, q, tokens, lengths, uniforms) -> Verdict:
        unchecked = torch.rand(len(p), q.shape[1], generator=coin) < share
        certain = torch.where(unchecked, 0.0, uniforms[:, :-1])
        return verify(p, q, tokens, lengths, torch.cat([certain, uniforms[:, -1:]], 1))

    monkeypatch.setattr(engine, "verify", careless)
    found = [law_of(scene, Sampling(1.0), seed=seed).favour.deviations for seed in (1, 2)]
    expected = Law().limit + 1.64
    assert sum(found) / 2 == pytest.approx(expected, rel=0.35)


def test_verdict_says_what_was_compared_and_how_small_an_error_it_would_notice(scene, law) -> None:
    target, draft, prompts = scene
    greedy = check_greedy(target, draft, prompts, 12, None, 4)
    found = verdict_of(greedy, law)
    assert found["lossless"] and greedy["identical"] + greedy["near_ties"] == 4
    first, second, third = sentences(found)
    assert first.startswith("greedy: 4 of 4 answers are plain decoding's token for token")
    assert f"once in {1 / LEVEL:,.0f} runs" in second
    assert "unchecked would be noticed with a probability of 95%" in third


def test_a_wrong_greedy_token_is_named(scene, monkeypatch) -> None:
    target, draft, prompts = scene
    monkeypatch.setattr(engine, "verify", accepts_always)
    greedy = check_greedy(target, draft, prompts, 12, None, 4)
    assert greedy["different"] and not verdict_of(greedy, Law())["lossless"]
    assert f"the first in {greedy['different'][0]['id']!r}" in sentences(verdict_of(greedy, Law()))[0]


# ── the commands ──────────────────────────────────────────────────────────────────────────────────────


def test_commands_on_the_packaged_draft(tmp_path) -> None:
    out = tmp_path / "calibration.json"
    words = ["calibrate", "pocket-dspark", "--limit", "9", "--max-new-tokens", "48", "--to", "sglang"]
    result = CliRunner().invoke(app, [*words, "--out", str(out)])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text("utf-8"))
    table = json.loads((tmp_path / "calibration.sglang.json").read_text("utf-8"))
    assert table["temperatures"] == report["temperatures"] and len(table["temperatures"]) == 7
    assert table["num_samples"] == report["rounds"] >= 100
    assert "by chance" in result.stdout
    words = ["verify", "pocket-dspark", "--limit", "2", "--repeats", "1", "--max-new-tokens", "16"]
    result = CliRunner().invoke(app, [*words, "--policy", "threshold:0.5", "--calibration", str(out)])
    assert result.exit_code == 0, result.output
    assert "scaled by the temperatures of" in result.stderr
    assert result.stdout.rstrip().endswith("lossless")
    assert "greedy: 2 of 2 answers are plain decoding's token for token" in result.stdout


def test_a_verdict_against_the_decoder_is_exit_code_1(monkeypatch) -> None:
    monkeypatch.setattr(engine, "verify", accepts_always)
    words = ["verify", "pocket-dspark", "--limit", "2", "--repeats", "1", "--max-new-tokens", "16", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["lossless"] is False and found["greedy"]["different"]
