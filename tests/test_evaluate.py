"""An evaluation that is killed, and goes on."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from deepspec import evaluate as module
from deepspec.drafts.lookup import PromptLookup
from deepspec.errors import DataError
from deepspec.evaluate import Prompt, evaluate_drafts
from deepspec.journal import beside
from deepspec.target import Target
from kills import killed_at, needs_fork
from talking import save_talking_llama

PROMPTS = [Prompt(f"p{i}", "ab"[i % 2], f"prompt {i}", (5, 6 + i, 7)) for i in range(3)]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    path = save_talking_llama(tmp_path_factory.mktemp("talking"))
    return Target.from_pretrained(path, dtype="float32", device="cpu")


def measured(target: Target, out: Path | None, **options: Any) -> dict[str, Any]:
    drafts = {"mine": PromptLookup(target.vocab_size, block=3)}
    return evaluate_drafts(target, drafts, PROMPTS, max_new_tokens=6, out=out, **options)


def untimed(results: Any) -> Any:
    """Without what depends on the clock."""
    clock = ("seconds", "tokens_per_s", "speedup", "speedup_mean_of_domains", "created", "baseline")
    if isinstance(results, dict):
        return {key: untimed(value) for key, value in results.items() if key not in clock}
    return [untimed(value) for value in results] if isinstance(results, list) else results


@needs_fork
def test_evaluation_killed_at_any_durable_operation_goes_on_to_the_same_results(target, tmp_path):
    undisturbed = measured(target, None)
    for operation in count(1):
        out = tmp_path / f"{operation}" / "eval.json"
        if not killed_at(operation, lambda out=out: measured(target, out)):
            break
        resumed = measured(target, out)
        assert untimed(resumed) == untimed(undisturbed)
        assert json.loads(out.read_text("utf-8")) == resumed
        assert not beside(out).exists()
    # The header; a write and an fsync for each prompt; the results' write, fsync and rename.
    assert operation > 1 + 2 * len(PROMPTS) + 3


def test_what_was_measured_before_a_kill_is_not_measured_again(target, tmp_path, monkeypatch):
    out, run, groups = tmp_path / "eval.json", module._measured, []

    def dying(target: Target, method: Any, group: Any) -> Any:
        groups.append(group[0].id)
        if len(groups) == 6:  # the second of four methods on the second prompt
            raise KeyboardInterrupt
        return run(target, method, group)

    monkeypatch.setattr(module, "_measured", dying)
    with pytest.raises(KeyboardInterrupt):
        measured(target, out)
    lines = [json.loads(line) for line in beside(out).read_text("utf-8").splitlines()]
    assert [line.get("group") for line in lines] == [None, 0]
    assert not out.exists()
    resumed = measured(target, out)
    assert groups[6:] == ["p1"] * 4 + ["p2"] * 4
    kept = {name: entry["seconds"] for name, entry in lines[1]["methods"].items()}
    assert {row["method"]: row["per_prompt"][0]["seconds"] for row in resumed["rows"]} == kept


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed was 0, now it is 1"),
        ({"baselines": False}, "methods was"),
        ({"batch": 2}, "batch"),
    ],
)
def test_evaluation_begun_under_other_conditions_is_not_gone_on_with(
    target, tmp_path, monkeypatch, changes, named
):
    out = tmp_path / "eval.json"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_rows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        measured(target, out)
    before = beside(out).read_bytes()
    with pytest.raises(DataError, match=named) as error:
        measured(target, out, **changes)
    assert str(beside(out)) in str(error.value)
    assert beside(out).read_bytes() == before


def test_another_draft_of_the_same_name_is_another_evaluation():
    """Weights are told apart by their content: a run's folder keeps its name while it trains on."""
    import torch

    one, two = torch.nn.Linear(2, 2, dtype=torch.bfloat16), torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    assert module._weights_hash(one) == module._weights_hash(one) != module._weights_hash(two)
    assert module._weights_hash(PromptLookup(9)) is None
