"""The whole loop on the pocket target: answers, features, three drafts, an evaluation, a report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from deepspec.answers.in_process import PACKAGED_ROWS, PACKAGED_TOKENS, regenerate
from deepspec.checkpoints.draft import load_draft
from deepspec.config import Recipe, load_recipe
from deepspec.data.conversations import Conversation, read_conversations
from deepspec.drafts.base import Draft
from deepspec.log import note
from deepspec.maths.verify import Sampling
from deepspec.measure.evaluate import evaluate_at, load_prompts, spread
from deepspec.pocket import prompts_path
from deepspec.report.page import write_report
from deepspec.targets import Target
from deepspec.this_machine import one_thread
from deepspec.train.data import cache_features
from deepspec.train.facts import data_facts, read_metrics
from deepspec.train.run import train_draft


class QuickstartSize(NamedTuple):
    """Prompts answered, minutes of training per draft, held-out prompts evaluated by temperature."""

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
"""What suits a minute and a half of training better than the recipes' half an hour (docs/log.md)."""


EVALUATED_TOKENS = 80
"""Budget of new tokens per prompt in the quickstart's evaluation."""


def quickstart_recipes(fast: bool) -> dict[str, Recipe]:
    """What the quickstart trains, by algorithm."""
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
    """Answers from the pocket target and its features on them, three drafts, an evaluation on held-out
    prompts, a report.

    `fast` does all of it on little data, in about two minutes: enough to see that it works, not how well.
    Returns the report's path and the results. Run again, it continues where it stopped.
    """
    out, began = Path(out), time.perf_counter()
    size = QUICKSTART[fast]
    target = Target.from_pretrained("pocket")
    rows: list[Conversation] = spread(list(read_conversations(prompts_path("pocket:train"))), size.prompts)
    answers = out / "data" / "answers.jsonl"
    note(f"1/5  the pocket target answers {len(rows)} prompts")
    regenerate(target, rows, answers, max_new_tokens=PACKAGED_TOKENS, max_rows=PACKAGED_ROWS)
    # By its content: the fast form and the full one may share a folder, and their answers.
    features = out / "features" / data_facts(answers)["data_hash"][:12]
    recipes = quickstart_recipes(fast)
    note("2/5  caching what the target computes on them: once, for three drafts")
    cache_features([*recipes.values()], features, target=target, answers=answers)
    drafts: dict[str, Draft] = {}
    training: dict[str, list[dict[str, Any]]] = {}
    for algorithm, recipe in recipes.items():
        data = recipe.data.model_copy(update={"features": f"cache:{features}"})
        recipe = recipe.model_copy(update={"data": data})
        note(f"3/5  training {algorithm} for {60 * size.minutes:.0f} s")
        outcome = train_draft(recipe, out, target=target, answers=answers)
        if outcome.interrupted:
            raise KeyboardInterrupt
        drafts[algorithm] = load_draft(outcome.best, target)
        drafts[algorithm].name = algorithm
        training[algorithm] = read_metrics(outcome.run)
    tasks = load_prompts(prompts_path("pocket:test"), target, limit=max(size.tasks.values()))
    note(f"4/5  evaluating on {len(tasks)} held-out prompts")
    # A second thread slows every method here, plain decoding too: its barriers cost more than it computes.
    with one_thread():
        results = evaluate_at(
            target,
            drafts,
            tasks,
            [Sampling(temperature) for temperature in size.tasks],
            limits=[*size.tasks.values()],
            max_new_tokens=EVALUATED_TOKENS,
            out=out / "eval.json",
        )
    note("5/5  writing the report")
    spent = time.perf_counter() - began
    notes = [f"Made by `deepspec quickstart{' --fast' if fast else ''}` in {spent / 60:.1f} minutes."]
    if fast:
        notes.append("The fast form trains for seconds: it shows that everything works, not how well.")
    path = write_report(out / "report.html", results, training, "deepspec quickstart", notes)
    return path, results
