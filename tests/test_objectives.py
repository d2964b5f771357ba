"""The page of objectives is its data file, and compares what the recipes and the loss really have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import objectives
import objectives_page
from deepspec.config import load_recipe
from deepspec.drafts import ALGORITHMS
from deepspec.maths.terms import TERMS


def test_page_is_the_data_file() -> None:
    results = json.loads(objectives_page.RESULTS.read_text("utf-8"))
    assert objectives_page.PAGE.read_text("utf-8") == objectives_page.page(results), (
        "run: python benchmarks/objectives.py --page"
    )


def test_every_term_and_rule_is_compared_under_the_keys_that_the_page_shows() -> None:
    assert set(objectives.OBJECTIVES) == set(objectives_page.SETTINGS)
    used = {key for loss in objectives.OBJECTIVES.values() for key in loss}
    assert set(TERMS) <= used
    for name, setting in objectives_page.SETTINGS.items():
        recipe = load_recipe("pocket-dflash", setting.strip("`").split())
        made = objectives.recipe_of("dflash", name, Path("out"), ["optim.max_steps=1"])
        assert recipe.loss == made.loss


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_objective_to_beat_is_the_recipe_s_own(algorithm: str) -> None:
    made = objectives.recipe_of(
        algorithm, objectives_page.RECIPES[algorithm], Path("out"), ["optim.max_steps=1"]
    )
    assert made.loss == load_recipe(f"pocket-{algorithm}").loss


def results(**kept: list[int]) -> dict[str, Any]:
    """Two seeds and four prompts of one round each, with these tokens kept per prompt and objective."""
    prompts = [f"p{i}" for i in range(4)]
    runs = [
        {
            "algorithm": "dflash",
            "objective": objective,
            "seed": seed,
            "steps": 3,
            "processor_seconds": 1.0,
            "counts": {p: [tokens[i] + seed, 1] for i, p in enumerate(prompts)},
        }
        for objective, tokens in kept.items()
        for seed in (0, 1)
    ]
    domains = dict(zip(prompts, ["code", "code", "math", "chat"], strict=True))
    costs = {"dflash": dict.fromkeys(kept, 0.1)}
    return {
        "seconds": 1,
        "machine": "",
        "step_seconds": costs,
        "domains": domains,
        "runs": runs,
        "overtrained": {},
    }


def test_what_all_objectives_share_cancels_in_a_difference() -> None:
    """Unpaired, prompts that differ by 6 tokens would hide a difference of 1 on each of them."""
    counts = objectives_page.Counts(results(ce=[1, 3, 5, 7], kl=[2, 4, 6, 8]), "dflash")
    assert counts.difference("kl", "ce") == (1.0, 1.0, 1.0)
    tau = objectives_page.interval(counts.tau("ce"))
    assert tau.value == 4.5 and tau.low < 3.5 and tau.high > 5.5


def test_a_run_that_is_trained_too_long_is_shown_with_its_best_step() -> None:
    rows = [
        *({"step": s, "epoch": s - 1, "loss": 5.0 / s, "tau_estimate": 1.0 + s} for s in (1, 2, 3)),
        *({"step": s, "held_out_tau": tau} for s, tau in ((1, 2.0), (2, 2.5), (3, 2.0))),
    ]
    found = results(ce=[1, 2, 3, 4]) | {
        "overtrained": {"answers": 8, "rows": rows, "rates": [[0.5, None], [0.4, 0.2]]}
    }
    page = objectives_page.page(found).replace("\n", " ")
    assert "highest at step 2 with 2.50, as low as 2.00 afterwards, and 2.00 at the end (-20.0%)" in page
    assert "| best, step 2 | 0.50 | – |" in page and "| last, step 3 | 0.40 | 0.20 |" in page


def test_seeds_and_prompts_are_both_drawn() -> None:
    counts = objectives_page.Counts(results(ce=[1, 1, 1, 1]), "dflash")
    assert set(counts.tau("ce").tolist()) == {1.0, 1.5, 2.0}
    assert torch.equal(counts.tau("ce", "math"), counts.tau("ce", "math"))


@pytest.mark.parametrize(
    ("kl", "verdict"),
    [
        ([2, 4, 6, 8], "On all three domains, with intervals above zero, `kl` beats `ce`"),
        ([2, 4, 6, 7], "No objective beats `ce` on all three domains"),
    ],
)
def test_a_winner_has_to_win_on_every_domain(kl: list[int], verdict: str) -> None:
    page = objectives_page.page(results(ce=[1, 3, 5, 7], kl=kl))
    assert verdict in page.replace("\n", " ")
