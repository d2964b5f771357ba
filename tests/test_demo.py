"""The quickstart: one folder that more than one size of it may share."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepspec import demo


def test_a_larger_quickstart_in_the_same_folder_caches_its_own_answers_and_evaluates_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    size = demo.QuickstartSize(prompts=2, minutes=0.001, tasks={0.0: 1, 1.0: 1})
    monkeypatch.setattr(demo, "QUICKSTART", {True: size})
    monkeypatch.setattr(demo, "LEARNING_RATE", {"dspark": 2e-3})
    small = {"eval_prompts": 1, "eval_max_new_tokens": 2}
    recipes = {n: recipe.model_copy(update=small) for n, recipe in demo.quickstart_recipes(True).items()}
    monkeypatch.setattr(demo, "quickstart_recipes", lambda fast: recipes)
    monkeypatch.setattr(demo, "PACKAGED_TOKENS", 4)
    monkeypatch.setattr(demo, "EVALUATED_TOKENS", 2)
    demo.quickstart(tmp_path / "run", fast=True)
    # More prompts in the same folder: its answers grow, and their features are another cache.
    (tmp_path / "run" / "eval-t0.partial.jsonl").write_text('{"seed": 0}\n', "utf-8")
    monkeypatch.setattr(demo, "QUICKSTART", {True: size._replace(prompts=3)})
    page, results = demo.quickstart(tmp_path / "run", fast=True)
    assert len(list((tmp_path / "run" / "features").iterdir())) == 2
    assert page.is_file() and len(results) == 2
    assert (tmp_path / "run" / "eval-t0.partial.old-1.jsonl").is_file()
