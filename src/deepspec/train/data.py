"""A recipe's training rows and the target features on them."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from deepspec.answers.in_process import answered
from deepspec.checkpoints.draft import check_draft
from deepspec.conditions import Conditions
from deepspec.config import Recipe, feature_source
from deepspec.connections import connections
from deepspec.data.conversations import read_conversations
from deepspec.data.rows import Rows, read_rows, write_rows
from deepspec.data.skipping import Skipped
from deepspec.data.template import template_conditions, template_date, template_hash
from deepspec.data.tokens import Encoded, require_tokenizer, tokenizer_hash
from deepspec.errors import RecipeError
from deepspec.features.batches import Source, load_rows, online
from deepspec.features.cache_read import cached, cached_rows, open_cache
from deepspec.features.cache_write import SHARD_BYTES, Plan, Written, plan_cache, write_cache
from deepspec.features.vllm import VllmSource, addresses
from deepspec.files import check_writable, writing
from deepspec.log import import_tracker, warn
from deepspec.pocket import prompts_path
from deepspec.targets import Target, TargetSpec
from deepspec.train.build import feature_layers, read_rules, sized_spec
from deepspec.train.dist import ALONE, Ranks, launched
from deepspec.train.facts import code_hash, data_facts, file_hash
from deepspec.train.optimizer import eight_bit_adamw

KEPT = ".rows"
"""The folder, next to the runs, of rows that were tokenised; it may be deleted."""


class TrainingData(NamedTuple):
    """name: for messages. about: `data_facts`. source: of the rows' features, already open."""

    name: str
    rows: Sequence[Encoded]
    about: dict[str, Any]
    source: Source


def check_before_loading(recipe: Recipe, answers: Path | None) -> None:
    """Raise UserError for what would stop a run after its target is loaded and its data tokenised."""
    if recipe.optim.states == "8bit":
        eight_bit_adamw()
    for tracker in recipe.trackers:
        if tracker != "none":
            import_tracker(tracker)
    form, place = feature_source(recipe.data.features)
    if form == "cache":
        open_cache(Path(place))
    else:
        check_answers(recipe, answers)
        if _asks(recipe, answers) and recipe.shard_target and launched()[1] > 1:
            raise RecipeError(
                f"data.train={recipe.data.train} has to be answered first, which one process does alone, and "
                "shard_target=true splits the target over all of them",
                where=recipe.name,
                next_step=f"write the answers with `deepspec data regenerate {recipe.data.train} --target "
                f"{recipe.target}`, through a server if no device holds the target, and set data.train to "
                "that file",
            )
    if form == "vllm":
        connections(addresses(place))
    _check_file("select", recipe)
    next(read_conversations(prompts_path(recipe.data.select)), None)


def check_answers(recipe: Recipe, answers: Path | None) -> None:
    """Raise UserError if the training file is missing, or its first line cannot be used."""
    if answers is None:
        _check_file("train", recipe)
    file = answers or prompts_path(recipe.data.train)
    skipped = Skipped() if recipe.data.skip_bad else None
    next(read_conversations(file, require_answer=not _asks(recipe, answers), skipped=skipped), None)


def _asks(recipe: Recipe, answers: Path | None) -> bool:
    """Whether the recipe trains on prompts, which the target answers before training."""
    return answers is None and recipe.data.train.startswith("pocket:")


def _check_file(key: str, recipe: Recipe) -> None:
    """Raise RecipeError, naming the recipe's key, if there is no such file."""
    name = getattr(recipe.data, key)
    if not (path := prompts_path(name)).is_file():
        raise RecipeError(
            f"data.{key} names a file that does not exist: {path}",
            where=recipe.name,
            next_step=f"give the path of a JSONL file, one conversation per line: data.{key}=FILE.jsonl",
        )


def check_target(recipe: Recipe, target: TargetSpec) -> None:
    """Raise UserError if the target cannot have the recipe's draft, or cannot answer as the recipe says: what
    is known without its weights."""
    sized_spec(recipe, target.config)
    if recipe.start_from is not None:
        check_draft(recipe.start_from, target)
    template_conditions(require_tokenizer(target.tokenizer(), target.name), recipe.thinking)


def training_data(
    recipe: Recipe,
    target: Target,
    layers: Sequence[int],
    run: Path,
    answers: Path | None,
    ranks: Ranks = ALONE,
) -> TrainingData:
    """The recipe's rows, tokenised from its answers or read from its feature cache, and their features.

    layers: of the target, that the draft reads. A feature server is opened before rows are made, so that a
    wrong one is found first. A cache brings its own rows; if there is also a file of answers, the cache must
    have been made from it. Raises UserError.
    """
    form, place = feature_source(recipe.data.features)
    reads, settings = read_rules(recipe), _row_settings(recipe)
    if form != "cache":
        source: Source = online(target, layers)
        if form == "vllm":
            settings["spare"] = 1  # which the server generates
            longest = target.room(1, recipe.data.max_length)
            source = VllmSource(place, target, layers, reads, max_length=longest)

        def made() -> TrainingData:
            file = answers or answered(recipe.data.train, target, recipe.thinking, run / "data")
            rows, about = kept_rows(file, target, row_facts(recipe, target), settings, run.parent / KEPT)
            return TrainingData(str(file), rows, about, source)

        return ranks.first(made)
    cache = open_cache(Path(place))
    words = ["deepspec", "data", "cache", run / "recipe.yaml", "--answers", answers or recipe.data.train]
    remedy = "make one that fits: " + shlex.join([*map(str, words), "--out", "DIR"])
    wanted = row_facts(recipe, target)
    if (given := answers or Path(recipe.data.train)).is_file():
        found = data_facts(given, cache.facts["first_rows"], skip_bad=recipe.data.skip_bad)
        wanted["data_hash"] = found["data_hash"]
    source = cached(cache, target, layers, reads, remedy, wanted)
    return TrainingData(place, cached_rows(cache), cache.facts["about"], source)


def kept_rows(
    file: Path, target: Target, facts: dict[str, Any], settings: dict[str, Any], folder: Path
) -> tuple[Rows, dict[str, Any]]:
    """(a file's rows, its `data_facts`), from an earlier start if anything kept fits, else made and kept in
    `folder`: reading and tokenising a million answers takes an hour. The arrays are mapped, so that processes
    on a machine share them. facts: what decides the rows, apart from the file's bytes and the settings."""
    key = [file_hash(file), facts, settings, target.spec.vocab_size, target.max_length]
    tokenizer = require_tokenizer(target.tokenizer, target.spec.name)
    key += [template_date(tokenizer), code_hash("data")]
    path = folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]}.safetensors"
    if path.exists():
        try:
            return read_rows(path)
        except (OSError, ValueError, SafetensorError) as error:
            warn(f"{path} cannot be read ({error}): the rows are made again")
    about = data_facts(file, skip_bad=settings.get("skip_bad", False))
    rows = load_rows(file, target, **settings)
    with writing(path):
        write_rows(path, rows, about)
    return rows, about


def _row_settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe's settings that decide how answers become rows."""
    settings = {"thinking": recipe.thinking}
    settings |= recipe.data.model_dump(include={"max_length", "min_supervised"})
    # Caches that were made before this key existed do not have it.
    return settings | ({"skip_bad": True} if recipe.data.skip_bad else {})


def row_facts(recipe: Recipe, target: Target) -> dict[str, Any]:
    """Everything that decides a recipe's rows, apart from the answers."""
    tokenizer = target.tokenizer
    assert tokenizer is not None
    now = Conditions(template_hash=template_hash(tokenizer), tokenizer_hash=tokenizer_hash(tokenizer))
    return now.record() | _row_settings(recipe)


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
    """Write, or continue writing, one feature cache for all the recipes: the union of what they read.

    answers: a file to use instead of the recipes' data.train. max_rows: only its first rows are taken.
    The recipes must make the same rows (`check_cache`). Raises what `write_cache` raises.
    """
    first = recipes[0]
    file = answers or answered(first.data.train, target, first.thinking, out / "answers")
    about = data_facts(file, max_rows, skip_bad=first.data.skip_bad)
    plan = plan_cache(
        load_rows(file, target, **_row_settings(first), limit=max_rows),
        target,
        sorted({layer for r in recipes for layer in feature_layers(r, target.spec.config)}),
        sorted({rule for r in recipes for rule in read_rules(r)}),
        dtype=dtype,
        about=row_facts(first, target)
        | {"data_hash": about["data_hash"], "first_rows": max_rows, "about": about},
        shard_bytes=shard_bytes,
    )
    return plan, write_cache(plan, target, out, rank=rank, world=world, verify=verify)


def check_cache(recipes: Sequence[Recipe], out: Path, answers: Path | None) -> None:
    """Raise UserError for what would stop `cache_features` after the target is loaded."""
    check_writable(out, folder=True)
    for other in recipes[1:]:
        _check_same_rows(recipes[0], other, answers)
    for recipe in recipes:
        check_target(recipe, TargetSpec.from_pretrained(recipe.target))
        check_answers(recipe, answers)


def _check_same_rows(one: Recipe, other: Recipe, answers: Path | None) -> None:
    """Raise RecipeError if two recipes make different rows, so that no cache can serve both."""
    a, b = ({"target": r.target, **_row_settings(r), "train": answers or r.data.train} for r in (one, other))
    for key in {**a, **b}:
        value, theirs = a.get(key, False), b.get(key, False)
        if value != theirs:
            name = key if key in ("target", "thinking") else f"data.{key}"
            raise RecipeError(
                f"{one.name} and {other.name} cannot share a cache: {name} is {value!r} and {theirs!r}",
                next_step=f"set it alike for both, such as {name}={value}, or write one cache for each",
            )
