"""A new algorithm is one file, one row and its recipes: shown by adding one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from deepspec import drafts
from deepspec.checkpoints.draft import load_draft
from deepspec.cli import app
from deepspec.config import load_recipe
from deepspec.drafts import ALGORITHMS, algorithm_of
from deepspec.drafts.dflash import DFlashDraft
from deepspec.errors import RecipeError
from deepspec.targets import Target
from talking import recipe_tree, save_talking_llama, write_data, write_recipe


class SmallStart(DFlashDraft):
    """A DFlash draft under another name: what a researcher's own file would hold."""


ROW = replace(
    ALGORITHMS["dflash"],
    title="Small start",
    draft=f"{__name__}:SmallStart",
    architectures={"qwen3": "Qwen3SmallStartModel", "gemma4": "Gemma4SmallStartModel"},
    claims=lambda config: True,
)


def good(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(drafts.ALGORITHMS, "small-start", ROW)


def test_a_new_algorithm_trains_evaluates_plans_and_exports_by_its_row_alone(
    row: None, tmp_path: Path
) -> None:
    target = save_talking_llama(tmp_path / "target")
    write_data(tmp_path)
    tree = recipe_tree(target, tmp_path, "dflash") | {"algorithm": "small-start", "name": "tiny"}
    recipe = write_recipe(tmp_path / "tiny.yaml", tree)

    good("train", recipe, "--runs", tmp_path / "runs")
    run = tmp_path / "runs" / "tiny"
    config = json.loads((run / "checkpoints" / "best" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3SmallStartModel"]
    draft = load_draft(run, Target.from_pretrained(str(target)))
    assert isinstance(draft, SmallStart) and draft.spec.algorithm == "small-start"

    words = ["--target", target, "--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", 4]
    report = tmp_path / "report.html"
    found = json.loads(good("eval", *words, "--draft", run, "--json", "--report", report))
    measured = next(each for each in found["rows"] if each["method"] == "tiny")
    assert measured["algorithm"] == "small-start"
    assert measured["lossless"] == {"identical": 3, "prompts": 3, "near_ties": 0}
    assert "Small start" in report.read_text("utf-8")

    asked = json.loads(good("plan", recipe, "--rows", 100, "--machine", "h200", "--json"))
    known = json.loads(good("plan", recipe, "algorithm=dflash", "--rows", 100, "--machine", "h200", "--json"))
    assert asked["sections"] == known["sections"]

    assert "small-start" in good("inspect", run, "--target", target)
    exported = json.loads(good("export", run, "--to", "deepspec", "--out", tmp_path / "out", "--json"))
    assert exported["architecture"] == "Qwen3SmallStartModel"
    refused = CliRunner().invoke(app, ["export", str(run), "--to", "vllm", "--out", str(tmp_path / "vllm")])
    assert "vLLM cannot run this draft" in refused.stderr  # the tiny target has two layers: it reads layer 0
    assert yaml.safe_load((run / "recipe.yaml").read_text())["algorithm"] == "small-start"


def test_an_algorithm_without_its_row_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match=r"`algorithm`: 'dspak' is not one of .*did you mean 'dspark'"):
        load_recipe("pocket-dspark", ["algorithm=dspak"])


def test_released_configs_of_one_architecture_are_told_apart_by_their_heads() -> None:
    block = {"architectures": ["Qwen3DSparkModel"]}
    assert algorithm_of(block) == ("dflash", "qwen3")
    assert algorithm_of(block | {"markov_rank": 8}) == ("dspark", "qwen3")
    assert algorithm_of(block | {"enable_confidence_head": True}) == ("dspark", "qwen3")
    assert algorithm_of({"architectures": ["Eagle3DraftModel"]}) == ("eagle3", "qwen3")
    assert algorithm_of({"architectures": ["LlamaForCausalLM"]}) is algorithm_of({}) is None


def test_no_config_is_claimed_by_two_algorithms() -> None:
    for heads in ({}, {"markov_rank": 4}, {"enable_confidence_head": True}):
        for architecture in {a for row in ALGORITHMS.values() for a in row.architectures.values()}:
            config = {"architectures": [architecture], **heads}
            claimed = [
                name
                for name, row in ALGORITHMS.items()
                if architecture in row.architectures.values() and row.claims(config)
            ]
            assert len(claimed) == 1
