"""An evaluation that is killed, and goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspec.decode.engine import Decoder, Request
from deepspec.drafts.lookup import PromptLookup
from deepspec.errors import DataError
from deepspec.maths.verify import Sampling
from deepspec.measure import evaluate as module
from deepspec.measure.evaluate import evaluate_at, evaluate_drafts, fingerprint, load_prompts
from deepspec.measure.evaluate import partial_path as beside
from deepspec.measure.rows import Prompt
from deepspec.targets import Target
from kills import killed_at, needs_fork
from talking import save_talking_llama, write_rows

PROMPTS = [Prompt(f"p{i}", "ab"[i % 2], f"prompt {i}", (5, 6 + i, 7)) for i in range(3)]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    path = save_talking_llama(tmp_path_factory.mktemp("talking"))
    return Target.from_pretrained(path, dtype="float32", device="cpu")


def measured(target: Target, out: Path | None, **options: Any) -> dict[str, Any]:
    drafts = {"mine": PromptLookup(target.vocab_size, block=3)}
    options = {"prompts": PROMPTS, "max_new_tokens": 3, "out": out, "baselines": False} | options
    return evaluate_drafts(target, drafts, **options)


def untimed(results: Any) -> Any:
    """Without what depends on the clock."""
    clock = ("seconds", "tokens_per_s", "speedup", "speedup_mean_of_domains", "created", "baseline")
    if isinstance(results, dict):
        return {key: untimed(value) for key, value in results.items() if key not in clock}
    return [untimed(value) for value in results] if isinstance(results, list) else results


@pytest.fixture(scope="module")
def undisturbed(target: Target) -> Any:
    return untimed(measured(target, None))


def test_prompt_that_fills_the_context_is_refused_with_its_line_before_anything_runs(target, tmp_path):
    path = write_rows(tmp_path / "prompts.jsonl", [("Hi", None), ("word " * 110, None)])
    with pytest.raises(DataError, match=r"the prompt is 5.. tokens, and .* reads at most 512") as caught:
        load_prompts(path, target)
    assert caught.value.where == f"{path}:2 (id r1)"
    assert [p.id for p in load_prompts(path, target, limit=1)] == ["r0"]


def test_penalties_of_the_generation_config_do_not_touch_the_baseline(target, monkeypatch):
    """It followed another law than plain decoding, and could be what speed-ups are measured against."""
    own = target.model.generation_config
    for key, value in {"repetition_penalty": 9.0, "num_beams": 3, "stop_strings": ["a"]}.items():
        monkeypatch.setattr(own, key, value)
    rows = {row["method"]: row for row in measured(target, None, baselines=True, max_new_tokens=8)["rows"]}
    assert rows["transformers generate"]["lossless"] == {"identical": 3, "prompts": 3, "near_ties": 0}


@needs_fork
@pytest.mark.parametrize("operation", [1, 4, 8])  # in the header, in a group's line, in the results
def test_evaluation_killed_goes_on_to_the_same_results(target, tmp_path, undisturbed, operation):
    """`test_files` kills the files at every operation."""
    out = tmp_path / "eval.json"
    assert killed_at(operation, lambda: measured(target, out))
    resumed = measured(target, out)
    assert untimed(resumed) == undisturbed
    assert json.loads(out.read_text("utf-8")) == resumed
    assert not beside(out).exists()


def test_what_was_measured_before_a_kill_is_not_measured_again(target, tmp_path, monkeypatch):
    out, run, groups = tmp_path / "eval.json", module._measured, []

    def dying(target: Target, method: Any, group: Any, budget: int) -> Any:
        groups.append(group[0].id)
        if len(groups) == 6:  # the second of four methods on the second prompt
            raise KeyboardInterrupt
        return run(target, method, group, budget)

    monkeypatch.setattr(module, "_measured", dying)
    with pytest.raises(KeyboardInterrupt):
        measured(target, out, baselines=True)
    lines = [json.loads(line) for line in beside(out).read_text("utf-8").splitlines()]
    assert [line.get("group") for line in lines] == [None, 0]
    assert not out.exists()
    resumed = measured(target, out, baselines=True)
    assert groups[6:] == ["p1"] * 4 + ["p2"] * 4
    kept = {name: entry["seconds"] for name, entry in lines[1]["methods"].items()}
    assert {row["method"]: row["per_prompt"][0]["seconds"] for row in resumed["rows"]} == kept


def test_warm_up_answers_are_short_and_enter_no_figure(target, monkeypatch):
    budgets, started = [], Decoder._start

    def start(decoder: Decoder, request: Request) -> Any:
        budgets.append(request.max_new_tokens)
        return started(decoder, request)

    monkeypatch.setattr(Decoder, "_start", start)
    monkeypatch.setattr(module, "WARM_UP_TOKENS", 2)
    result = measured(target, None, max_new_tokens=4, baselines=True)
    ours = 3  # plain, prompt lookup and the draft; transformers' generate is not decoded here
    assert budgets == [2] * ours + [4] * ours * len(PROMPTS)
    assert {len(row["per_prompt"]) for row in result["rows"]} == {len(PROMPTS)}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sampling": Sampling(0.5)}, "temperature"),
        ({"seed": 1}, "seed"),
        ({"baselines": True}, "methods"),
        ({"batch": 2}, "batch"),
        # The same tokens under other ids are drawn with other seeds.
        ({"prompts": [replace(p, id=p.id + "x") for p in PROMPTS]}, "prompt ids"),
    ],
)
def test_beginning_of_another_evaluation_steps_aside(target, tmp_path, monkeypatch, capsys, changes, named):
    out = tmp_path / "eval.json"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "rows_of", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        measured(target, out)
    before = beside(out).read_bytes()
    assert measured(target, out, **changes)["rows"]
    assert (tmp_path / "eval.partial.old-1.jsonl").read_bytes() == before
    assert not beside(out).exists()
    assert f"was begun with another '{named}'" in " ".join(capsys.readouterr().err.split())


def test_kill_during_the_last_temperature_costs_the_first_one_nothing(target, tmp_path, monkeypatch):
    out, run, groups = tmp_path / "eval.json", module._measured, []

    def dying(target: Target, method: Any, group: Any, budget: int) -> Any:
        groups.append(group[0].id)
        if len(groups) == 9:
            raise KeyboardInterrupt
        return run(target, method, group, budget)

    samplings = [Sampling(0.0), Sampling(1.0)]
    drafts = {"mine": PromptLookup(target.vocab_size, block=3)}
    monkeypatch.setattr(module, "_measured", dying)
    with pytest.raises(KeyboardInterrupt):
        evaluate_at(target, drafts, PROMPTS[:2], samplings, limits=[2, 1], out=out, max_new_tokens=3)
    first = json.loads((tmp_path / "eval-t0.json").read_text("utf-8"))
    again = evaluate_at(target, drafts, PROMPTS[:2], samplings, limits=[2, 1], out=out, max_new_tokens=3)
    assert len(groups) == 9 + 4
    assert again[0]["rows"] == first["rows"]
    assert [len(result["rows"][0]["per_prompt"]) for result in again] == [2, 1]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["eval-t0.json", "eval-t1.json"]


def test_line_separators_in_an_id_do_not_tear_the_journal(target, tmp_path, monkeypatch):
    prompts = [replace(PROMPTS[0], id="one\u2028two\x85three")]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "rows_of", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        measured(target, tmp_path / "eval.json", prompts=prompts)
    monkeypatch.setattr(module, "_measured", lambda *_: pytest.fail("measured again"))
    assert measured(target, tmp_path / "eval.json", prompts=prompts)["rows"]


def test_models_of_one_name_are_told_apart_by_their_weights():
    """A run's folder keeps its name while it trains on."""
    one, two = torch.nn.Linear(2, 2, dtype=torch.bfloat16), torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    assert fingerprint(one) == fingerprint(one) != fingerprint(two)
    assert fingerprint(PromptLookup(9)) is None
