"""Everything that a plan depends on: recipe, target, data, machine, and what recipes leave open."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from deepspec.config import Recipe
from deepspec.cost.dimensions import draft_dimensions, target_dimensions
from deepspec.cost.formulas import slots_that_count
from deepspec.cost.machines import Machine
from deepspec.drafts import ALGORITHMS
from deepspec.drafts.spec import DraftSpec
from deepspec.errors import DataError
from deepspec.features.order import batches_by_length

PUBLISHED_ROWS = 1_300_000
PUBLISHED_TOKENS = 38e12 / 30_726
"""Tokens of the published training set, whose cache for Qwen3-4B is 38 TB at 30,726 bytes a token: six
vectors of 2,560 bfloat16 numbers, an id and two masks. Ours keeps one mask."""
PUBLISHED_PROMPT = 200
"""Tokens of a prompt, on average: an assumption."""
USUAL_BATCH = {"process": 16, "server": 256}
"""Answers that are decoded together unless a number is given, by what decodes them."""

Describe = Callable[[Recipe, Mapping[str, Any]], tuple[DraftSpec, int]]
"""(recipe, raw text config of its target) -> its draft's spec and how many parameters it has itself."""


@dataclass(frozen=True)
class Counts:
    """Tokens of prompt and answer of some rows, each of which stands for `weight` rows of the training set.

    answered: whether the answers exist already. notes: what was assumed or sampled on the way.
    """

    prompts: tuple[float, ...]
    answers: tuple[float, ...]
    weight: float = 1.0
    answered: bool = False
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> float:
        return len(self.prompts) * self.weight

    def of(self, rows: float) -> Counts:
        """As many rows, with the same distribution of lengths."""
        return replace(self, weight=self.weight * rows / self.rows)


def assumed_counts(rows: float, prompt: float, answer: float) -> Counts:
    """Every row as long as the mean."""
    words = f"{rows:,.0f} rows of {prompt:,.0f} + {answer:,.0f} tokens are assumed, all as long as the mean"
    return Counts((prompt,), (answer,), rows, notes=(words,))


def published_counts() -> Counts:
    """The training set of the published drafts, from the size of its cache."""
    mean = PUBLISHED_TOKENS / PUBLISHED_ROWS
    found = assumed_counts(PUBLISHED_ROWS, PUBLISHED_PROMPT, mean - PUBLISHED_PROMPT)
    note = f"there is no data file: {found.notes[0]}, as in the published set (from its cache of 38 TB)"
    return replace(found, notes=(note,))


@dataclass(frozen=True)
class Inputs:
    """What a plan is made from.

    config: the target's raw text config. describe: from a recipe to its draft (it needs torch, so the caller
    brings it). features: online or cache; store: the number format of a cache. engine: process or server,
    what writes the answers; batch: how many it decodes together. free_disk: bytes. gpus: accelerators of one
    host that train together, each with its share of every batch.
    """

    recipe: Recipe
    config: Mapping[str, Any]
    counts: Counts
    machine: Machine
    describe: Describe
    features: str = "online"
    store: str = "bf16"
    engine: str = "process"
    batch: int | None = None
    free_disk: float | None = None
    gpus: int = 1

    @cached_property
    def names(self) -> dict[str, float]:
        """The named numbers of target, draft (see `dimensions`) and data (see `data_names`), and `batch`.

        Raises RecipeError if the recipe describes no draft for that target, DataError if no row is left.
        """
        spec, own = self.describe(self.recipe, self.config)
        draft = draft_dimensions(spec, own, self.recipe.precision)
        data = data_names(self.recipe, self.counts) | {"batch": self.batch or USUAL_BATCH[self.engine]}
        return target_dimensions(self.config) | draft | data

    @property
    def taught(self) -> bool:
        """Whether the loss reads the target's last hidden states, and not only features as context."""
        return ALGORITHMS[self.recipe.algorithm].reads(self.recipe.loss) != ("context",)

    @property
    def offloads(self) -> bool:
        """Whether masters and moments are in the host's memory, and the model is not."""
        return self.recipe.offload_optimizer and self.machine.memory is not None

    @property
    def fused(self) -> bool:
        """Whether a compiler makes one kernel of passes over memory, as it does on accelerators."""
        return self.machine.memory is not None and self.recipe.compile is not False

    @property
    def answers_here(self) -> bool:
        """Whether this process writes the answers first."""
        return self.engine == "process" and not self.counts.answered

    @property
    def per_epoch(self) -> int:
        """Optimiser steps."""
        return self.recipe.steps_per_epoch(math.ceil(self.names["rows"]))


def data_names(recipe: Recipe, counts: Counts) -> dict[str, float]:
    """The data as named numbers: rows cut to `data.max_length`, without those that have too little to learn.

    rows, tokens, prompts, answers (tokens of either). reach: the length that a token meets, on average over
    tokens. padding: tokens computed for each real one. anchors, slots: anchors of a sequence and slots of a
    block in the loss, on average. length, longest: tokens of a sequence. Raises DataError if no row is left.
    """
    prompts, answers = np.asarray(counts.prompts, float), np.asarray(counts.answers, float)
    lengths = np.minimum(prompts + answers, recipe.data.max_length)
    supervised = np.maximum(lengths - prompts, 0)
    kept = supervised >= recipe.data.min_supervised
    if not kept.any():
        raise DataError(
            f"no row has {recipe.data.min_supervised} supervised tokens within data.max_length",
            next_step=f"raise data.max_length above {recipe.data.max_length}",
        )
    lengths, supervised, prompts = lengths[kept], supervised[kept], prompts[kept]
    anchors = np.minimum(recipe.num_anchors, np.maximum(supervised - 1, 1))
    slots = [slots_that_count(s, recipe.draft.block) for s in supervised]
    assumed = len(counts.prompts) == 1 and counts.weight > 1
    return {
        "rows": len(lengths) * counts.weight,
        "tokens": float(lengths.sum()) * counts.weight,
        "prompts": float(prompts.sum()) * counts.weight,
        "answers": float(supervised.sum()) * counts.weight,
        "reach": float((lengths**2).sum() / lengths.sum()),
        "padding": 1.0 if assumed else _padding([int(n) for n in lengths], recipe),
        "anchors": float(anchors.mean()),
        "slots": float((anchors * slots).sum() / anchors.sum()),
        "length": float(lengths.mean()),
        "longest": int(lengths.max()) if counts.weight == 1 else recipe.data.max_length,
    }


def _padding(lengths: list[int], recipe: Recipe) -> float:
    """Tokens that a step computes for each real one: its micro-batches are all as wide as the whole batch."""
    shuffled = np.random.default_rng(recipe.seed).permutation(len(lengths)).tolist()
    batches = batches_by_length(shuffled, lengths, recipe.optim.batch_size)
    return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches) / sum(lengths)
