"""Infinities and NaN: refused by one error that says whose they are and in which rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import deepspec.train.loop as loop
from conftest import prompts_of, tiny_draft
from deepspec.answers.file import beside
from deepspec.answers.in_process import regenerate
from deepspec.checkpoints.draft import save_draft
from deepspec.cli import app
from deepspec.config import load_recipe
from deepspec.data.conversations import conversation_from_row
from deepspec.data.tokens import Encoded
from deepspec.decode.engine import Decoder, Request, generate
from deepspec.drafts.base import choose
from deepspec.drafts.lookup import PromptLookup
from deepspec.errors import CheckpointError, NonFiniteError
from deepspec.features.cache_read import cached, cached_rows, open_cache
from deepspec.features.cache_write import plan_cache, write_cache
from deepspec.maths.verify import Sampling, defined, warp
from deepspec.measure.evaluate import evaluate_drafts, partial_path
from deepspec.measure.rows import Prompt
from deepspec.targets import Target
from deepspec.targets.model import StepOutput
from deepspec.train.loop import train_draft
from deepspec.train.run import open_run
from kills import contents
from talking import recipe_tree, save_talking_llama, train_in, write_data, write_recipe
from test_train import recipe_for, rows_for

BAD = 61
"""The token that breaks `poisoned` targets."""


@contextmanager
def poisoned(target: Target, value: float = math.nan, layer: int = 1, token: int = BAD) -> Iterator[None]:
    """Inside the block, reading the token gives `value` in one place after a layer."""
    ids: list[Tensor] = []

    def before(module: Any, inputs: Any, named: dict[str, Any]) -> None:
        ids[:] = [named["input_ids"]]

    def after(module: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[..., 3].masked_fill_(ids[0] == token, value)

    hooks = [
        target.decoder.register_forward_pre_hook(before, with_kwargs=True),
        target.decoder.layers[layer].register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def clean_prompts(target: Target, lengths: Sequence[int]) -> list[list[int]]:
    return [[(t + 1) % target.vocab_size if t == BAD else t for t in p] for p in prompts_of(target, lengths)]


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Target:
    path = save_talking_llama(tmp_path_factory.mktemp("talking"))
    return Target.from_pretrained(path, dtype="float32", device="cpu")


# ── distributions ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(1.0),
        Sampling(0.7),
        Sampling(1.0, 2),
        Sampling(1.0, 0, 0.8),
        Sampling(0.5, 2, 0.8),
    ],
)
def test_logits_without_a_finite_maximum_have_no_distribution_and_others_keep_theirs(sampling):
    logits = torch.tensor([[0.5, 2.0, -math.inf, 1.0]]).repeat(5, 1)
    logits[0, 2], logits[1, 0], logits[2] = math.nan, math.inf, -math.inf
    logits[3, 1] = -math.inf
    expected = [False, False, False, True, True]
    for samplings in (sampling, [sampling] * 4 + [Sampling()]):
        p = warp(logits, samplings)
        assert defined(p).tolist() == expected
        assert p[:3, 0].isnan().all()
        assert torch.equal(p[3:4], warp(logits[3:4], sampling))
    assert defined(choose(logits, sampling, torch.full((5,), 0.5))[1]).tolist() == expected


# ── decoding ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", ["plain", "lookup", "dspark"])
def test_row_at_fault_is_named_and_the_others_are_as_without_it(targets, monkeypatch, method, temperature):
    """Its slot is the next row's, whom NaN in old keys and values would reach through every mask."""

    def without_bad(logits: Tensor, *rest: Any) -> Any:
        return choose(logits.index_fill(-1, torch.tensor([bad]), -math.inf), *rest)

    monkeypatch.setattr("deepspec.drafts.dspark.choose", without_bad)
    target = targets["llama"]
    drafts: dict[str, Any] = {"plain": None, "lookup": PromptLookup(target.vocab_size, block=3)}
    draft = drafts.get(method) if method != "dspark" else tiny_draft(target, "dspark")
    prompts = prompts_of(target, (20, 10, 4, 5))
    options = {"max_new_tokens": 8, "temperature": temperature, "ignore_eos": True}
    for bad in set(range(target.vocab_size)).difference(*prompts):
        expected = [g.token_ids for g in generate(target, draft, prompts, **options)]
        if not any(bad in tokens for tokens in expected):
            break
    prompts[1][6] = bad
    with poisoned(target, token=bad):
        decoder = Decoder(target, draft, max_rows=2)
        requests = iter(Request(p, 8, i, f"p{i}", Sampling(temperature)) for i, p in enumerate(prompts))
        found = {}
        with pytest.raises(NonFiniteError, match=r"infinities or NaN in (its logits|layer 1)") as caught:
            found |= {g.key: g.token_ids for g in decoder.run(requests)}
        assert caught.value.rows == ("p1",)
        assert str(target.spec.name) in str(caught.value) and "row 'p1'" in str(caught.value)
        found |= {g.key: g.token_ids for g in decoder.run(requests)}
    wanted = {f"p{i}": tokens for i, tokens in enumerate(expected) if i != 1}
    assert {key: found[key] for key in found} == {key: wanted[key] for key in found}
    assert wanted.keys() - found.keys() <= {"p0"}  # what finished before the error went with the generator


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", ["lookup", "eagle3", "dspark"])
def test_fault_of_a_rejected_proposal_changes_no_answer(targets, monkeypatch, method, temperature):
    """In one pass NaN reaches the tokens before it too; drawing them from the target at once, as if nothing
    had been proposed, would change the law of sampled ones."""
    target, proposed, names = targets["llama"], set(), ("token_ids", "accepted", "proposed")
    draft: Any = PromptLookup(64, block=3) if method == "lookup" else tiny_draft(target, method)
    prompts, options = prompts_of(target, (7, 12, 5)), {"max_new_tokens": 16, "temperature": temperature}
    propose = draft.propose

    def noting(*words: Any) -> Any:
        proposal = propose(*words)
        proposed.update(proposal.tokens.flatten().tolist())
        return proposal

    monkeypatch.setattr(draft, "propose", noting)
    expected = generate(target, draft, prompts, **options)
    rejected = proposed.difference(*(answer.token_ids for answer in expected), *prompts)
    if method == "lookup":  # it proposes nothing but what it has read
        rejected, at_once = {BAD}, draft._continue
        assert not any(BAD in answer.token_ids for answer in expected)
        monkeypatch.setattr(draft, "_continue", lambda *words: [at_once(*words)[0], BAD, BAD])
        expected = generate(target, draft, prompts, **options)
    assert rejected
    for bad in sorted(rejected)[:3]:
        with poisoned(target, token=bad):
            found = generate(target, draft, prompts, **options)
        for ours, theirs in zip(found, expected, strict=True):
            assert all(getattr(ours, name) == getattr(theirs, name) for name in names)


def test_fault_in_a_round_commits_nothing_and_hands_out_the_other_rows_events(targets):
    target = targets["llama"]
    prompts = clean_prompts(target, (5, 8))
    plain = [g.token_ids for g in generate(target, None, prompts, 6, ignore_eos=True)]
    decoder = Decoder(target, None, max_rows=2)
    for i, prompt in enumerate(prompts):
        decoder.submit(Request(prompt, 6, i, f"p{i}"))
    first = [event for _ in prompts for event in decoder.step()]
    assert [e.tokens for e in first] == [p[:1] for p in plain]
    decoder.rows[0].anchor = BAD  # what the target is given next
    with poisoned(target), pytest.raises(NonFiniteError, match="in its logits") as caught:
        decoder.step()
    assert (caught.value.rows, first[0].answer.token_ids) == (("p0",), plain[0][:1])
    assert [(e.answer.key, e.tokens) for e in decoder.step()] == [("p1", plain[1][1:2])]
    while not decoder.idle:
        (event,) = decoder.step()
    assert event.answer.token_ids == plain[1]


def test_infinity_in_one_layer_that_only_the_draft_reads_is_the_targets_fault(targets, monkeypatch):
    target, draft = targets["llama"], tiny_draft(targets["llama"], "dflash")
    step = Target._step_cached

    def overflowing(self: Target, *what: Any) -> StepOutput:
        last, features = step(self, *what)
        assert features is not None
        features[:, 0, 40] = math.inf
        return StepOutput(last, features)

    monkeypatch.setattr(Target, "_step_cached", overflowing)
    with pytest.raises(NonFiniteError, match="infinities or NaN in layer 1, ") as caught:
        generate(target, draft, prompts_of(target, (6,)), 4)
    assert caught.value.next_step == NonFiniteError.OF_TARGET


@pytest.mark.parametrize(
    ("algorithm", "weight", "part"),
    [
        ("eagle3", "fc.weight", "its logits"),
        ("dflash", "norm.weight", "its logits"),
        ("dspark", "markov_head.markov_w2.weight", "its logits"),
        ("dspark", "confidence_head.proj.bias", "its confidences"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_draft_that_gives_no_numbers_is_named(targets, algorithm, weight, part, value, temperature):
    target, draft = targets["llama"], tiny_draft(targets["llama"], algorithm)
    with torch.no_grad():
        draft.state_dict()[weight].fill_(value)
    with pytest.raises(NonFiniteError, match=f"the draft {algorithm} gives infinities or NaN in {part}"):
        generate(target, draft, prompts_of(target, (6, 9)), 4, temperature=temperature)


# ── answers and measurements ──────────────────────────────────────────────────────────────────────────


def asked(name: str, text: str) -> Any:
    return conversation_from_row({"id": name, "messages": [{"role": "user", "content": text}]})


def answers_of(path: Path) -> dict[str, Any]:
    return {row["id"]: row["answer_ids"] for row in map(json.loads, path.read_text("utf-8").splitlines())}


def test_regenerate_lists_the_row_answers_the_others_and_ends_in_the_error(talking, tmp_path):
    letter = talking.tokenizer.convert_ids_to_tokens(BAD)
    rows = [asked("a", "one"), asked("b", "two"), asked("c", "three"), asked("d", "four")]
    options = {"max_new_tokens": 3, "max_rows": 2}
    regenerate(talking, rows, tmp_path / "whole.jsonl", **options)
    whole = answers_of(tmp_path / "whole.jsonl")
    assert not any(BAD in ids for ids in whole.values())
    rows[1] = asked("b", f"tw{letter}")
    out = tmp_path / "out.jsonl"
    with poisoned(talking):
        with pytest.raises(NonFiniteError, match="in its logits") as caught:
            regenerate(talking, rows, out, **options)
        assert caught.value.rows == ("b",)
        assert answers_of(out) == {key: ids for key, ids in whole.items() if key != "b"}
        (failed,) = map(json.loads, beside(out, "failures").read_text("utf-8").splitlines())
        assert failed["id"] == "b" and "infinities or NaN" in failed["reason"]
        bad = [asked(name, f"{letter} {name}") for name in "xyz"]
        with pytest.raises(NonFiniteError) as caught:
            regenerate(talking, bad, tmp_path / "bad.jsonl", **options)
        assert sorted(caught.value.rows) == ["x", "y", "z"]
        assert (tmp_path / "bad.jsonl").read_bytes() == b""


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_evaluation_names_the_prompt_and_writes_no_results(talking, tmp_path, temperature):
    """transformers' generate takes its turn first on the second prompt: NaN would end its sampling badly."""
    prompts = [Prompt("p0", "a", "", (5, 6, 7)), Prompt("p1", "a", "", (5, BAD, 7))]
    out = tmp_path / "eval.json"
    with poisoned(talking, math.inf), pytest.raises(NonFiniteError, match="in its logits"):
        evaluate_drafts(talking, {}, prompts, Sampling(temperature), max_new_tokens=3, out=out)
    assert not out.exists()
    lines = partial_path(out).read_text("utf-8").splitlines()
    assert [json.loads(line).get("group") for line in lines] == [None, 0]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a recipe, and a target of which one weight is NaN."""
    folder = tmp_path_factory.mktemp("broken")
    path = save_talking_llama(folder / "target")
    healthy = Target.from_pretrained(path)
    save_draft(tiny_draft(healthy, "dspark"), folder / "draft", healthy, {})
    weights = load_file(path / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][0, 0] = math.nan
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    assert AutoModelForCausalLM.from_pretrained(path) is not None
    write_data(folder)
    write_recipe(folder / "r.yaml", recipe_tree(path, folder, "dspark"))
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "eval --target {t} --draft {d} --prompts {f}/prompts.jsonl --out {o}/out",
        "generate hello --target {t} --plain",
        "data regenerate {f}/prompts.jsonl --out {o}/out --target {t}",
        "data cache {f}/r.yaml --out {o}/out",
        "train {f}/r.yaml --runs {o}/out",
        "plan {f}/r.yaml --machine here",
    ],
)
def test_every_command_refuses_a_target_of_nan_with_one_message(broken, tmp_path, monkeypatch, command):
    monkeypatch.setenv("DEEPSPEC_CACHE", str(tmp_path / "speeds"))
    words = command.format(t=broken / "target", f=broken, o=tmp_path, d=broken / "draft").split()
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output
    said = " ".join(result.stderr.split())
    assert "gives infinities or NaN in its logits, from which nothing can be learnt or decoded" in said
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_fresh_run_keeps_the_earlier_one_in_place_if_the_target_is_refused(broken, tmp_path, capsys):
    recipe = load_recipe(str(broken / "r.yaml"))
    with open_run(tmp_path, recipe):
        before = contents(tmp_path)
    with pytest.raises(NonFiniteError):
        train_draft(recipe, tmp_path, fresh=True)
    assert contents(tmp_path) == before


# ── training ──────────────────────────────────────────────────────────────────────────────────────────


def clean_rows(target: Target) -> list[Encoded]:
    return [
        Encoded(ids=[(t + 1) % 60 if t == BAD else t for t in r.ids], loss_mask=r.loss_mask, id=r.id)
        for r in rows_for(target)
    ]


@pytest.mark.parametrize(
    ("algorithm", "value"), [("eagle3", math.nan), ("dflash", math.inf), ("dspark", -math.inf)]
)
def test_training_names_layer_and_row_and_leaves_its_checkpoints(targets, tmp_path, algorithm, value):
    target, rows = targets["llama"], clean_rows(targets["llama"])
    train_in(tmp_path, recipe_for(algorithm), target, rows, lambda draft: 1.5)
    before = contents(tmp_path / "checkpoints")
    rows[3] = Encoded(ids=[*rows[3].ids[:5], BAD, *rows[3].ids[6:]], loss_mask=rows[3].loss_mask, id="r3")
    more = recipe_for(algorithm, optim={"lr": 1e-2, "batch_size": 4, "max_steps": 12})
    with poisoned(target, value), pytest.raises(NonFiniteError, match="in layer 1, ") as caught:
        train_in(tmp_path, more, target, rows, lambda draft: 9.0)
    assert caught.value.rows == ("r3",)
    assert contents(tmp_path / "checkpoints") == before


def test_gradients_of_nan_under_a_finite_loss_change_nothing(targets, tmp_path, monkeypatch):
    target, rows, seen = targets["llama"], clean_rows(targets["llama"]), {}
    real = loop.train_step

    def poisoning(draft: Any, *rest: Any) -> Any:
        loss, sums = real(draft, *rest)
        optimizer = rest[5]
        if rest[3] == 4:
            seen["before"] = [m.detach().clone() for m in optimizer.masters]
            seen["masters"] = optimizer.masters
            optimizer.parameters[0].grad[0] = math.nan
            assert loss.isfinite()
        return loss, sums

    monkeypatch.setattr(loop, "train_step", poisoning)
    with pytest.raises(
        NonFiniteError, match="training gives infinities or NaN in the loss or the gradients of step 5"
    ):
        train_in(tmp_path, recipe_for("dspark", precision="bfloat16"), target, rows)
    assert all(map(torch.equal, seen["before"], seen["masters"]))
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_3"]


def test_loss_that_explodes_in_bfloat16_names_its_rows(targets, tmp_path, monkeypatch):
    target, rows = targets["llama"], clean_rows(targets["llama"])
    build = loop.Optimizer.__init__

    def enormous(self: Any, draft: Any, *settings: Any) -> None:
        with torch.no_grad():
            draft.layers[0].mlp.down_proj.weight.fill_(3e38)
        build(self, draft, *settings)

    monkeypatch.setattr(loop.Optimizer, "__init__", enormous)
    with pytest.raises(NonFiniteError, match="the loss or the gradients of step 1") as caught:
        train_in(tmp_path, recipe_for("dflash", precision="bfloat16"), target, rows)
    assert len(caught.value.rows) == 4 and "lower optim.lr" in str(caught.value)
    assert not (tmp_path / "checkpoints").exists()


def test_held_out_measurement_of_nan_is_never_the_best(targets, tmp_path):
    target, rows = targets["llama"], clean_rows(targets["llama"])
    taus = iter([1.5, math.nan])
    with pytest.raises(NonFiniteError, match="in τ after step 6"):
        train_in(tmp_path, recipe_for("dflash"), target, rows, lambda draft: next(taus))
    facts = json.loads((tmp_path / "checkpoints/best/deepspec.json").read_text())
    assert (facts["step"], facts["held_out_tau"]) == (3, 1.5)


def test_weights_that_a_last_step_broke_are_not_saved(targets, tmp_path):
    target, rows = targets["llama"], clean_rows(targets["llama"])

    def breaking(draft: Any) -> float:
        with torch.no_grad():
            draft.fc.weight[0, 0] = math.nan
        return 1.5

    with pytest.raises(CheckpointError, match=r"fc\.weight holds numbers that are not finite"):
        train_in(tmp_path, recipe_for("dflash", checkpoint_every_steps=2), target, rows, breaking)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_2"]


def test_cache_that_holds_nan_is_named_with_layer_and_row(targets, tmp_path):
    """Older versions wrote such caches; so does a disk that fails."""
    target, rows = targets["llama"], clean_rows(targets["llama"])
    plan = plan_cache(rows, target, [0, 1, 2], ["context", "labels"], about={})
    write_cache(plan, target, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    tensors = load_file(file)
    tensors["features"][2, -1, 5] = math.nan  # of the last row's last stored position
    save_file(tensors, file)
    cache = open_cache(tmp_path / "cache")
    source = cached(cache, target, [0, 1, 2], ["context"])
    recipe = recipe_for("dflash")
    data = recipe.data.model_copy(update={"features": f"cache:{tmp_path / 'cache'}"})
    recipe = recipe.model_copy(update={"data": data})
    with pytest.raises(NonFiniteError, match=r"cache:.* gives infinities or NaN in layer 2, ") as caught:
        train_in(tmp_path / "run", recipe, target, cached_rows(cache), source=source)
    assert caught.value.rows == ("r9",)
    tensors["features"][1, 0, 5] = math.inf  # of the row that is compared when the cache is opened
    save_file(tensors, file)
    with pytest.raises(NonFiniteError, match=r"cache:.* gives infinities or NaN in layer 1, "):
        cached(open_cache(tmp_path / "cache"), target, [0, 1, 2], ["context"])
