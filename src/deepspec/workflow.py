"""Rooms wired together: a recipe from data to best checkpoint, and the quickstart from nothing to a report.

`train` and `decode` don't know each other; this is where a training run gets its held-out measurement.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from deepspec import pocket
from deepspec.checkpoint import AnyDraft, find_checkpoint, load_draft, load_provenance
from deepspec.compare import MODE, mode_differences
from deepspec.config import Recipe, dump_recipe, load_recipe
from deepspec.data.conversations import Conversation, content_hash, read_conversations
from deepspec.data.features import load_rows
from deepspec.data.regenerate import regenerate
from deepspec.data.tokens import system_hash, template_hash, tokenizer_hash
from deepspec.drafts.base import Draft
from deepspec.errors import RecipeError
from deepspec.evaluate import evaluate_drafts, held_out_tau, load_prompts, spread
from deepspec.files import plain, write_json
from deepspec.log import note, warn
from deepspec.report import write_report
from deepspec.target import Target
from deepspec.train import Outcome, latest_checkpoint, train
from deepspec.verify import Sampling

ALGORITHMS = ("eagle3", "dflash", "dspark")
ANSWER_TOKENS = 224
ANSWER_ROWS = 48
"""Prompts that the pocket target answers together."""


def data_file(name: str) -> Path:
    """A data path, or the packaged file of `pocket:train`, `pocket:select`, `pocket:test`."""
    return pocket.prompt_file(name.removeprefix("pocket:")) if name.startswith("pocket:") else Path(name)


def answered(name: str, target: Target, thinking: bool, beside: Path) -> Path:
    """The file of training conversations: as given, or, for packaged prompts, answered by the target now."""
    if not name.startswith("pocket:"):
        return Path(name)
    mode = "thinking" if thinking else "plain"
    out = beside / f"{name.removeprefix('pocket:')}-{mode}.jsonl"
    regenerate(
        target,
        list(read_conversations(data_file(name))),
        out,
        thinking=thinking,
        max_new_tokens=ANSWER_TOKENS,
        max_rows=ANSWER_ROWS,
    )
    return out


def train_draft(
    recipe: Recipe, runs: Path | str = "runs", *, target: Target | None = None, answers: Path | None = None
) -> Outcome:
    """Train a recipe into runs/<name>, or go on where it stopped.

    `answers` stands in for the recipe's training file. Held-out τ on the recipe's select prompts picks the
    best checkpoint. Raises UserError for bad data, recipes or targets.
    """
    target = target or Target.from_pretrained(recipe.target)
    run = Path(runs) / recipe.name
    run.mkdir(parents=True, exist_ok=True)
    _keep_recipe(recipe, run)
    source = answers or answered(recipe.data.train, target, recipe.thinking, run / "data")
    rows = load_rows(
        source,
        target,
        thinking=recipe.thinking,
        max_length=recipe.data.max_length,
        min_supervised=recipe.data.min_supervised,
    )
    prompts = load_prompts(
        data_file(recipe.data.select), target, thinking=recipe.thinking, limit=recipe.eval_prompts
    )

    def held_out(draft: AnyDraft) -> float:
        return held_out_tau(target, draft, prompts, recipe.eval_max_new_tokens)

    facts = provenance(recipe, target, source)
    for sentence in mode_differences(f"{source} was answered", facts["data"], "the recipe trains", facts):
        warn(sentence)
    return train(recipe, target, rows, run, facts, held_out)


def _keep_recipe(recipe: Recipe, run: Path) -> None:
    """Write the resolved recipe; say so when the run was started with another one.

    Raises RecipeError where that run began from another draft: going on would not fine-tune this one.
    """
    path = run / "recipe.yaml"
    before = load_recipe(path) if path.exists() else recipe
    if before.start_from != recipe.start_from and latest_checkpoint(run) is not None:
        raise RecipeError(
            f"{run} is a run that began from {before.start_from or 'fresh weights'}, "
            f"not from {recipe.start_from or 'fresh weights'}",
            next_step="give this one a name of its own (name=NAME), or start anew with --fresh",
        )
    if before != recipe:
        note(f"{run} was started with another recipe; it goes on with this one")
    dump_recipe(recipe, path)


def provenance(recipe: Recipe, target: Target, source: Path) -> dict[str, Any]:
    """What a checkpoint says of where it came from. `data`: the conditions that the answers carry."""
    assert target.tokenizer is not None
    rows = list(read_conversations(source))
    carried = {key: only_one([r.meta.get(key) for r in rows]) for key in ("target", *MODE, "sampling")}
    carried["system_prompt"] = only_one([system_hash(r.messages) for r in rows])
    return {
        "target": target.spec.name,
        "target_config_hash": target.spec.config_hash,
        "tokenizer_hash": tokenizer_hash(target.tokenizer),
        "template_hash": template_hash(target.tokenizer),
        "thinking": recipe.thinking,
        "system_prompt": carried["system_prompt"],
        "sampling": carried["sampling"],
        "data_hash": content_hash(rows),
        "data_rows": len(rows),
        "data": carried,
        "started_from": started_from(recipe),
        "recipe": recipe.model_dump(mode="json"),
    }


def only_one(values: Sequence[Any]) -> Any:
    """The value that all rows share, or "several"."""
    return values[0] if all(v == values[0] for v in values) else "several"


def started_from(recipe: Recipe) -> dict[str, Any] | None:
    """Which draft a fine-tuned one began as, and under what conditions that one was trained."""
    if recipe.start_from is None:
        return None
    facts = load_provenance(find_checkpoint(recipe.start_from))
    return {"draft": recipe.start_from} | {k: facts.get(k) for k in (*MODE, "data_hash", "step")}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """A run's metrics.jsonl; empty for a packaged draft."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def evaluate_to(
    folder: Path,
    target: Target,
    drafts: dict[str, Draft],
    *,
    temperatures: Sequence[float],
    prompts: Path,
    limit: int | None,
    thinking: bool = False,
    max_new_tokens: int = 128,
    baselines: bool = True,
) -> list[dict[str, Any]]:
    """Evaluate at each temperature and write <folder>/eval-t<temperature>.json."""
    tasks = load_prompts(prompts, target, thinking=thinking, limit=limit)
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for temperature in temperatures:
        result = plain(
            evaluate_drafts(
                target,
                drafts,
                tasks,
                Sampling(temperature),
                thinking=thinking,
                max_new_tokens=max_new_tokens,
                baselines=baselines,
            )
        )
        write_json(folder / f"eval-t{temperature:g}.json", result)
        results.append(result)
    return results


class QuickstartSize(NamedTuple):
    """Prompts answered, minutes of training per draft, held-out prompts in the evaluation."""

    prompts: int
    minutes: float
    tasks: int


QUICKSTART = {False: QuickstartSize(1200, 2.0, 24), True: QuickstartSize(150, 0.2, 6)}
"""By `fast`."""
EVALUATED_TOKENS = 96
"""Budget of new tokens per prompt in the quickstart's evaluation."""
EVALUATED_AT = (0.0, 1.0)


def quickstart_recipes(fast: bool) -> dict[str, Recipe]:
    """What the quickstart trains, by algorithm."""
    changes: dict[str, Any] = {"trackers": ["none"]} if fast else {}
    minutes = f"optim.max_minutes={QUICKSTART[fast].minutes}"
    return {
        algorithm: load_recipe(f"pocket-{algorithm}", [minutes]).model_copy(
            update={"name": algorithm, **changes}
        )
        for algorithm in ALGORITHMS
    }


def quickstart(
    out: Path | str = "runs/quickstart", *, fast: bool = False
) -> tuple[Path, list[dict[str, Any]]]:
    """Answers from the pocket target, three drafts, an evaluation on held-out prompts, a report.

    `fast` does all of it on little data, in about two minutes: enough to see that it works, not how well.
    Returns the report's path and the results; `phases.json` beside them says how many seconds each phase
    took. Run again, it goes on where it stopped.
    """
    out, began = Path(out), time.perf_counter()
    size, seconds = QUICKSTART[fast], {}
    target = Target.from_pretrained("pocket")
    rows: list[Conversation] = spread(list(read_conversations(data_file("pocket:train"))), size.prompts)
    seconds["loading"] = time.perf_counter() - began
    answers = out / "data" / "answers.jsonl"
    note(f"1/4  the pocket target answers {len(rows)} prompts")
    regenerate(target, rows, answers, max_new_tokens=ANSWER_TOKENS, max_rows=ANSWER_ROWS)
    seconds["answers"] = time.perf_counter() - began - sum(seconds.values())
    drafts: dict[str, Draft] = {}
    training: dict[str, list[dict[str, Any]]] = {}
    for algorithm, recipe in quickstart_recipes(fast).items():
        note(f"2/4  training {algorithm} for {60 * size.minutes:.0f} s")
        outcome = train_draft(recipe, out, target=target, answers=answers)
        if outcome.interrupted:
            raise KeyboardInterrupt
        drafts[algorithm] = load_draft(outcome.best, target)
        drafts[algorithm].name = algorithm
        training[algorithm] = read_metrics(outcome.run)
        seconds[f"training {algorithm}"] = time.perf_counter() - began - sum(seconds.values())
    note(f"3/4  evaluating on {size.tasks} held-out prompts")
    results = evaluate_to(
        out,
        target,
        drafts,
        temperatures=EVALUATED_AT,
        prompts=data_file("pocket:test"),
        limit=size.tasks,
        max_new_tokens=EVALUATED_TOKENS,
    )
    seconds["evaluation"] = time.perf_counter() - began - sum(seconds.values())
    note("4/4  writing the report")
    spent = time.perf_counter() - began
    notes = [f"Made by `deepspec quickstart{' --fast' if fast else ''}` in {spent / 60:.1f} minutes."]
    if fast:
        notes.append("The fast form trains for seconds: it shows that everything works, not how well.")
    path = write_report(out / "report.html", results, training, "deepspec quickstart", notes)
    seconds["report"] = time.perf_counter() - began - sum(seconds.values())
    write_json(out / "phases.json", {name: round(spent, 3) for name, spent in seconds.items()})
    return path, results


def train_pocket_drafts(
    out: Path | str, *, minutes: float = 30.0, samples: int = 4, seed: int = 0
) -> dict[str, Outcome]:
    """The ready-made drafts: `samples` answers to every training prompt, each draft trained for `minutes`."""
    out = Path(out)
    target = Target.from_pretrained("pocket")
    answers = out / "answers.jsonl"
    prompts = list(read_conversations(data_file("pocket:train")))
    for k in range(samples):
        some = [replace(c, id=f"{c.id}.{k}") if k else c for c in prompts]
        regenerate(target, some, answers, max_new_tokens=ANSWER_TOKENS, max_rows=ANSWER_ROWS)
    outcomes = {}
    for algorithm in ALGORITHMS:
        recipe = load_recipe(f"pocket-{algorithm}", [f"optim.max_minutes={minutes}", f"seed={seed}"])
        outcomes[algorithm] = train_draft(recipe, out, target=target, answers=answers)
        if outcomes[algorithm].interrupted:
            raise KeyboardInterrupt
    return outcomes
