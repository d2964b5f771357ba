"""The quickstart: the whole loop on the pocket target, from prompts to a report on three drafts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from deepspec.answers.in_process import PACKAGED_ROWS, PACKAGED_TOKENS, regenerate
from deepspec.checkpoints.draft import load_draft
from deepspec.config import Recipe, load_recipe
from deepspec.data.conversations import read_conversations
from deepspec.drafts.base import Draft
from deepspec.log import note
from deepspec.maths.verify import Sampling
from deepspec.measure.evaluate import evaluate_at, load_prompts, spread
from deepspec.pocket import prompts_path
from deepspec.report.page import write_report
from deepspec.report.results import read_metrics
from deepspec.targets import Target
from deepspec.this_machine import one_thread
from deepspec.train.data import cache_features
from deepspec.train.facts import data_facts
from deepspec.train.loop import train_draft


class QuickstartSize(NamedTuple):
    """prompts: answered. minutes: of training per draft. tasks: prompts evaluated, by temperature."""

    prompts: int
    minutes: float
    tasks: Mapping[float, int]


QUICKSTART = {
    False: QuickstartSize(900, 1.5, {0.0: 15, 1.0: 6}),
    True: QuickstartSize(150, 0.2, {0.0: 3, 1.0: 3}),
}
"""By `fast`."""
FOR_MINUTES = ("draft.init=target", "eval_every_steps=600")
LEARNING_RATE = {"eagle3": 4.0e-3, "dflash": 2.0e-3, "dspark": 2.0e-3}
"""Rates for a minute and a half of training; the recipes' own are for half an hour (docs/log.md)."""
EVALUATED_TOKENS = 80
"""New tokens per prompt, at most, in the quickstart's evaluation."""


def quickstart_recipes(fast: bool) -> dict[str, Recipe]:
    """The recipes that the quickstart trains, by algorithm."""
    changes: dict[str, Any] = {"trackers": ["none"]} if fast else {}
    budget = f"optim.max_minutes={QUICKSTART[fast].minutes}"
    return {
        algorithm: load_recipe(
            f"pocket-{algorithm}", [budget, *FOR_MINUTES, f"optim.lr={LEARNING_RATE[algorithm]}"]
        ).model_copy(update={"name": algorithm, **changes})
        for algorithm in LEARNING_RATE
    }


def quickstart(
    out: Path | str = "runs/quickstart", *, fast: bool = False
) -> tuple[Path, list[dict[str, Any]]]:
    """Have the pocket target answer prompts, cache its features, train three drafts, evaluate and report.

    fast: do all of it on little data in about two minutes, which shows that it works, but not how well.
    Returns the report's path and the results. The same call continues where an earlier one stopped.
    """
    out, began, size = Path(out), time.perf_counter(), QUICKSTART[fast]
    target = Target.from_pretrained("pocket")
    rows = spread(list(read_conversations(prompts_path("pocket:train"))), size.prompts)
    answers = out / "data" / "answers.jsonl"
    note(f"1/5  the pocket target answers {len(rows)} prompts")
    regenerate(target, rows, answers, max_new_tokens=PACKAGED_TOKENS, max_rows=PACKAGED_ROWS)
    # Named by the answers' content: the fast quickstart and the full one may share a folder.
    features = out / "features" / data_facts(answers)["data_hash"][:12]
    recipes = quickstart_recipes(fast)
    note("2/5  caching what the target computes on them, once for three drafts")
    cache_features([*recipes.values()], features, target=target, answers=answers)
    drafts: dict[str, Draft] = {}
    training: dict[str, list[dict[str, Any]]] = {}
    for algorithm, recipe in recipes.items():
        note(f"3/5  training {algorithm} for {60 * size.minutes:.0f} s")
        data = recipe.data.model_copy(update={"features": f"cache:{features}"})
        # The full quickstart continues the drafts of a fast one in its folder, on more data.
        outcome = train_draft(recipe.model_copy(update={"data": data}), out, target=target, force=True)
        if outcome.interrupted:
            raise KeyboardInterrupt
        drafts[algorithm] = load_draft(outcome.best, target)
        drafts[algorithm].name = algorithm
        training[algorithm] = read_metrics(outcome.run / "metrics.jsonl")
    count = max(size.tasks.values())
    note(f"4/5  evaluating on {count} held-out prompts")
    # A second thread slows every method here, plain decoding too: its barriers cost more than it computes.
    with one_thread():
        results = evaluate_at(
            target,
            drafts,
            load_prompts(prompts_path("pocket:test"), target, limit=count),
            [Sampling(temperature) for temperature in size.tasks],
            limits=[*size.tasks.values()],
            max_new_tokens=EVALUATED_TOKENS,
            out=out / "eval.json",
        )
    note("5/5  writing the report")
    spent = time.perf_counter() - began
    notes = [f"Made by `deepspec quickstart{' --fast' if fast else ''}` in {spent / 60:.1f} minutes."]
    if fast:
        notes.append("The fast quickstart trains for seconds: it shows that everything works, not how well.")
    path = write_report(out / "report.html", results, training, "deepspec quickstart", notes)
    return path, results
