"""What a plan is asked about: a recipe for a target, on data, on a machine, with what recipes leave open."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from deepspec.checkpoints.read import draft_shapes
from deepspec.config import Recipe
from deepspec.cost.costs import Dimensions, dimensions
from deepspec.cost.counts import Counts, Totals, totals
from deepspec.cost.machines import Machine
from deepspec.cost.phases import ASSUMED_TAU, Speeds
from deepspec.drafts.spec import DraftSpec
from deepspec.train.build import draft_spec

ENGINES = {"process": 16, "server": 256}
"""What answers, and how many answers it decodes together where nothing else is said."""


@dataclass(frozen=True)
class Choices:
    """What a recipe leaves open. features: online, or cache. store: a cache's number format. positions: those
    that the loss reads, as `deepspec data cache` stores them, or all, as the published caches do. engine:
    process, or server. batch: answers decoded together."""

    features: str = "online"
    store: str = "bf16"
    positions: str = "read"
    engine: str = "process"
    batch: int = 16
    free_disk: float | None = None
    answered: bool = False
    """The answers are there already."""

    @classmethod
    def answering(cls, engine: str, batch: int | None = None, **rest: Any) -> Choices:
        """With as many answers decoded together as is usual: 16 in process, 256 in a server."""
        return cls(engine=engine, batch=batch or ENGINES[engine], **rest)


@dataclass(frozen=True)
class Asked:
    """Everything that the figures of a plan depend on. own: parameters of the draft; embedding and head are
    the target's. tau: what held-out evaluations are taken to accept."""

    recipe: Recipe
    dims: Dimensions
    spec: DraftSpec
    own: int
    size: Totals
    machine: Machine
    choices: Choices
    speeds: Speeds | None
    tau: float

    @property
    def per_epoch(self) -> int:
        """Optimiser steps."""
        return max(math.ceil(self.size.rows / self.recipe.optim.batch_size), 1)

    @property
    def answers(self) -> bool:
        """Whether this process has answers to write first."""
        return not self.choices.answered and self.choices.engine == "process"


def ask(
    recipe: Recipe,
    config: dict[str, Any],
    counts: Counts,
    machine: Machine,
    choices: Choices | None = None,
    speeds: Speeds | None = None,
    tau: float = ASSUMED_TAU,
) -> Asked:
    """config: the target's raw text config. Raises RecipeError where the recipe describes no draft for that
    target, DataError where no row is left."""
    # A block draft's mask token is chosen from the target's vocabulary; it does not change any size.
    mask = None if recipe.algorithm == "eagle3" else recipe.draft.mask_token_id or 0
    spec = draft_spec(recipe, config, mask)
    return Asked(
        recipe,
        dimensions(config),
        spec,
        _own_parameters(spec),
        totals(recipe, counts),
        machine,
        choices or Choices(),
        speeds,
        tau,
    )


@lru_cache(maxsize=64)
def _own_parameters(spec: DraftSpec) -> int:
    return sum(math.prod(shape) for shape in draft_shapes(spec).values())
