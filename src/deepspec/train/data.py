"""A recipe's training rows and the target features on them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deepspec.answers.in_process import answered
from deepspec.config import Recipe, feature_source
from deepspec.data.tokens import Encoded, template_hash, tokenizer_hash
from deepspec.errors import RecipeError
from deepspec.features.batches import Source, load_rows
from deepspec.features.cache_read import cached, cached_rows, check_rows, open_cache
from deepspec.features.cache_write import SHARD_BYTES, Plan, Written, plan_cache, write_cache
from deepspec.features.open import open_features
from deepspec.targets import Target
from deepspec.train.build import feature_layers, read_rules
from deepspec.train.facts import data_facts


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
