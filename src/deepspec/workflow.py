"""Rooms wired together: a recipe from data to best checkpoint, and the quickstart from nothing to a report.

`train` and `decode` don't know each other; this is where a training run gets its held-out measurement.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from deepspec import pocket
from deepspec.blocks import with_last_hidden
from deepspec.build import feature_layers, read_rules
from deepspec.checkpoint import AnyDraft, find_checkpoint, load_draft, load_provenance
from deepspec.compare import MODE, mode_differences
from deepspec.config import Recipe, dump_recipe, feature_source, load_recipe
from deepspec.data.cache import SHARD_BYTES, Plan, Written, plan_cache, write_cache
from deepspec.data.cached import cached, cached_rows, check_rows, open_cache
from deepspec.data.conversations import Conversation, content_hash, read_conversations
from deepspec.data.feature_launch import refuse_sglang
from deepspec.data.features import Source, load_rows
from deepspec.data.opening import open_features
from deepspec.data.regenerate import regenerate
from deepspec.data.tokens import Encoded, system_hash, template_hash, tokenizer_hash
from deepspec.drafts.base import Draft
from deepspec.errors import RecipeError
from deepspec.evaluate import evaluate_at, held_out_tau, load_prompts, spread
from deepspec.files import alone_in, write_json
from deepspec.log import note, warn
from deepspec.machine import one_thread
from deepspec.report import write_report
from deepspec.target import Target, TargetSpec
from deepspec.train import Outcome, eight_bit_adamw, latest_checkpoint, train
from deepspec.verify import Sampling

ALGORITHMS = ("eagle3", "dflash", "dspark")
ANSWER_TOKENS = 224
ANSWER_ROWS = 64
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
    best checkpoint. Raises UserError for bad data, recipes or targets, and where another
    process trains there.
    """
    _check_before_loading(recipe, answers)
    if target is None:
        TargetSpec.from_pretrained(recipe.target)  # a mistyped name should not leave a folder behind
    run = Path(runs) / recipe.name
    with alone_in(run, "training"):
        return _train_in(run, recipe, target or Target.from_pretrained(recipe.target), answers)


def _train_in(run: Path, recipe: Recipe, target: Target, answers: Path | None) -> Outcome:
    _keep_recipe(recipe, run)
    data = training_data(recipe, target, run, answers)
    prompts = load_prompts(
        data_file(recipe.data.select), target, thinking=recipe.thinking, limit=recipe.eval_prompts
    )

    def held_out(draft: AnyDraft) -> float:
        return held_out_tau(target, draft, prompts, recipe.eval_max_new_tokens)

    facts = provenance(recipe, target, data.about)
    for sentence in mode_differences(f"{data.name} was answered", facts["data"], "the recipe trains", facts):
        warn(sentence)
    return train(recipe, target, data.rows, run, facts, held_out, data.source)


def _check_before_loading(recipe: Recipe, answers: Path | None) -> None:
    """Raise UserError for what would stop a run once its target is loaded and its data tokenised."""
    if recipe.optim.states == "8bit":
        eight_bit_adamw()
    form, _ = feature_source(recipe.data.features)
    if form == "sglang":
        refuse_sglang(recipe.draft.target_layer_ids or (), with_last_hidden(read_rules(recipe)))
    next(read_conversations(data_file(recipe.data.select)), None)
    if form != "cache":
        asked_now = answers is None and recipe.data.train.startswith("pocket:")
        file = answers or data_file(recipe.data.train)
        next(read_conversations(file, require_answer=not asked_now), None)


class TrainingData(NamedTuple):
    """name: for messages. about: `data_facts`. source: of features, where it comes with the rows."""

    name: str
    rows: Sequence[Encoded]
    about: dict[str, Any]
    source: Source | None


def training_data(recipe: Recipe, target: Target, run: Path, answers: Path | None) -> TrainingData:
    """The recipe's rows: tokenised from its answers, or as they lie in its feature cache.

    A feature server is opened before there are rows, so that a wrong one is found first. A cache brings its
    own rows; where there is also a file of answers, it must be the one that the cache was made from. Raises
    UserError.
    """
    form, place = feature_source(recipe.data.features)
    layers, reads = feature_layers(recipe, target.spec.config), read_rules(recipe)
    if form != "cache":
        source = open_features(recipe.data.features, target, layers, reads, max_length=recipe.data.max_length)
        file = answers or answered(recipe.data.train, target, recipe.thinking, run / "data")
        rows = load_rows(file, target, **_row_settings(recipe))
        return TrainingData(str(file), rows, data_facts(file), source)
    cache = open_cache(Path(place))
    words = ["deepspec", "data", "cache", run / "recipe.yaml", "--answers", answers or recipe.data.train]
    remedy = "make one that fits: " + shlex.join([*map(str, words), "--out", "DIR"])
    given = answers or Path(recipe.data.train)
    wanted = row_facts(recipe, target)
    if given.is_file():
        wanted["data_hash"] = data_facts(given, cache.facts["first_rows"])["data_hash"]
    check_rows(cache, wanted, remedy)
    source = cached(cache, target, layers, reads, remedy)
    return TrainingData(place, cached_rows(cache), cache.facts["about"], source)


def _row_settings(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says of how its answers become rows."""
    data = recipe.data
    return {
        "thinking": recipe.thinking,
        "max_length": data.max_length,
        "min_supervised": data.min_supervised,
    }


def row_facts(recipe: Recipe, target: Target) -> dict[str, Any]:
    """Everything but the answers that decides a recipe's rows."""
    assert target.tokenizer is not None
    return {
        "tokenizer_hash": tokenizer_hash(target.tokenizer),
        "template_hash": template_hash(target.tokenizer),
        **_row_settings(recipe),
    }


def cache_features(
    recipes: Sequence[Recipe],
    out: Path,
    *,
    target: Target,
    answers: Path | None = None,
    dtype: str = "bf16",
    max_rows: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    verify: bool = False,
    rank: int = 0,
    world: int = 1,
) -> tuple[Plan, Written]:
    """Write, or go on writing, one feature cache that serves all the recipes: their layers and positions.

    answers: instead of the recipes' data.train. max_rows: the first ones of that file. Raises RecipeError
    where the recipes make different rows, and what `write_cache` raises.
    """
    first = recipes[0]
    for other in recipes[1:]:
        sides = [(key, getattr(first, key), getattr(other, key)) for key in ("target", "thinking")]
        sides += [
            (f"data.{key}", getattr(first.data, key), getattr(other.data, key))
            for key in ("max_length", "min_supervised", "train")
        ]
        for key, one, two in sides:
            if one != two and not (answers and key == "data.train"):
                raise RecipeError(
                    f"{first.name} and {other.name} do not share a cache: {key} is {one!r} and {two!r}",
                    next_step=f"set it for both, such as {key}={one}, or write one cache for each",
                )
    file = answers or answered(first.data.train, target, first.thinking, out / "answers")
    rows = load_rows(file, target, **_row_settings(first), limit=max_rows)
    about = data_facts(file, max_rows)
    plan = plan_cache(
        rows,
        target,
        sorted({layer for r in recipes for layer in feature_layers(r, target.spec.config)}),
        sorted({rule for r in recipes for rule in read_rules(r)}),
        dtype=dtype,
        about=row_facts(first, target)
        | {"data_hash": about["data_hash"], "first_rows": max_rows, "about": about},
        shard_bytes=shard_bytes,
    )
    return plan, write_cache(plan, target, out, rank=rank, world=world, verify=verify)


def _keep_recipe(recipe: Recipe, run: Path) -> None:
    """Write the resolved recipe; say so when the run was started with another one.

    Raises RecipeError, and leaves the run's own recipe as it is, where that run began from another draft or
    trains a draft of another kind: going on would train neither.
    """
    path = run / "recipe.yaml"
    going_on = path.exists() and latest_checkpoint(run) is not None
    before = load_recipe(path) if going_on else recipe
    other = _other_draft(before, recipe)
    if other:
        raise RecipeError(
            f"{run} is a run that trains another draft: {'; '.join(other)}",
            next_step="give this one a name of its own (name=NAME), or start anew with --fresh",
        )
    if before.start_from != recipe.start_from:
        raise RecipeError(
            f"{run} is a run that began from {before.start_from or 'fresh weights'}, "
            f"not from {recipe.start_from or 'fresh weights'}",
            next_step="give this one a name of its own (name=NAME), or start anew with --fresh",
        )
    if before != recipe:
        note(f"{run} was started with another recipe; it goes on with this one")
    dump_recipe(recipe, path)


def _other_draft(before: Recipe, now: Recipe) -> list[str]:
    """What makes the drafts of two recipes different ones, weights of equal shapes included."""
    have, want = (
        {"algorithm": r.algorithm} | {f"draft.{k}": v for k, v in r.draft.model_dump().items()}
        for r in (before, now)
    )
    keys = (k for k in have if k != "draft.step_loss_decay" and have[k] != want[k])
    return [f"its {key} is {have[key]}, the recipe's {want[key]}" for key in keys]


def data_facts(source: Path, limit: int | None = None) -> dict[str, Any]:
    """What a checkpoint says of a file of answers. `data`: the conditions that they carry and share.

    limit: of its first rows.
    """
    carried: dict[str, Any] = {}
    count = 0

    def noting() -> Iterator[Conversation]:
        nonlocal count
        for row in islice(read_conversations(source), limit):
            count += 1
            facts = {key: row.meta.get(key) for key in ("target", *MODE, "sampling")}
            facts["system_prompt"] = system_hash(row.messages)
            for key, value in facts.items():
                carried[key] = only_one(carried.get(key, value), value)
            yield row

    return {"data_hash": content_hash(noting()), "data_rows": count, "data": carried}


def provenance(recipe: Recipe, target: Target, about: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of where it came from. about: `data_facts` of its training data."""
    assert target.tokenizer is not None
    carried = about["data"]
    return {
        "target": target.spec.name,
        "target_config_hash": target.spec.config_hash,
        "tokenizer_hash": tokenizer_hash(target.tokenizer),
        "template_hash": template_hash(target.tokenizer),
        "thinking": recipe.thinking,
        "system_prompt": carried["system_prompt"],
        "sampling": carried["sampling"],
        **about,
        "started_from": started_from(recipe),
        "recipe": recipe.model_dump(mode="json"),
    }


def only_one(so_far: Any, value: Any) -> Any:
    """The value that all rows share, or "several"."""
    return so_far if so_far == value else "several"


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
        for algorithm in ALGORITHMS
    }


def quickstart(
    out: Path | str = "runs/quickstart", *, fast: bool = False
) -> tuple[Path, list[dict[str, Any]]]:
    """Answers from the pocket target and its features on them, three drafts, an evaluation on held-out
    prompts, a report.

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
    note(f"1/5  the pocket target answers {len(rows)} prompts")
    regenerate(target, rows, answers, max_new_tokens=ANSWER_TOKENS, max_rows=ANSWER_ROWS)
    seconds["answers"] = time.perf_counter() - began - sum(seconds.values())
    # By its content: the fast form and the full one may share a folder, and their answers.
    features = out / "features" / data_facts(answers)["data_hash"][:12]
    recipes = quickstart_recipes(fast)
    note("2/5  caching what the target computes on them: once, for three drafts")
    cache_features([*recipes.values()], features, target=target, answers=answers)
    seconds["features"] = time.perf_counter() - began - sum(seconds.values())
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
        seconds[f"training {algorithm}"] = time.perf_counter() - began - sum(seconds.values())
    tasks = load_prompts(data_file("pocket:test"), target, limit=max(size.tasks.values()))
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
    seconds["evaluation"] = time.perf_counter() - began - sum(seconds.values())
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
