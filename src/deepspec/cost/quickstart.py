"""The quickstart's phases in seconds, from measured speeds: what `phases.json` of a run then holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from deepspec.config import Recipe
from deepspec.cost import phases
from deepspec.cost.asked import Choices
from deepspec.cost.costs import Figure, figure
from deepspec.cost.counts import Counts
from deepspec.cost.figures import Plan, make_plan
from deepspec.cost.machines import Machine
from deepspec.cost.phases import Speeds
from deepspec.cost.room import Need
from deepspec.measure.evaluate import WARM_UP_TOKENS

EARLY_TAU = 1.2
"""Accepted length of a draft trained for seconds: an assumption."""
LOOKUP_TAU = 1.4
"""Of prompt lookup on short prompts: an assumption."""


def quickstart_plans(
    recipes: Mapping[str, Recipe],
    config: dict[str, Any],
    prompts: int,
    machine: Machine,
    choices: Choices,
    speeds: Speeds,
) -> dict[str, Plan]:
    """The plan of each draft, on as many answers as the quickstart has written by then, from its cache."""
    counts = Counts(tuple(map(float, speeds.prompts)), tuple(map(float, speeds.answers))).of(prompts)
    answered = replace(choices, answered=True, features="cache")
    return {
        name: make_plan(recipe, config, counts, machine, answered, speeds, training_tau(recipe))
        for name, recipe in recipes.items()
    }


def quickstart_needs(plans: Mapping[str, Plan]) -> tuple[Need, ...]:
    """What has to fit: one cache and every draft's checkpoints on the disk; of the rest, the most that any
    draft takes, since they are trained one after another."""
    checkpoints = {name: plan.sections["disk"]["checkpoints"].value for name, plan in plans.items()}
    found: dict[str, Need] = {}
    for name, plan in plans.items():
        others = sum(checkpoints.values()) - checkpoints[name]
        for need in plan.needs:
            wants = need.wants + (others if need.what == "disk" else 0.0)
            if need.what not in found or wants > found[need.what].wants:
                found[need.what] = replace(need, wants=wants)
    return tuple(found.values())


def training_tau(recipe: Recipe) -> float:
    """What a pocket draft accepts on the way, by its minutes of training."""
    return EARLY_TAU if (recipe.optim.max_minutes or 1.0) < 1.0 else phases.ASSUMED_TAU


def quickstart_phases(
    plans: Mapping[str, Plan],
    speeds: Speeds,
    *,
    prompts: int,
    slots: int,
    tasks: Sequence[int],
    new_tokens: int,
) -> dict[str, Figure]:
    """Seconds by phase, by the names of `phases.json`. tasks: prompts evaluated at each temperature."""
    found = {
        "loading": figure("s", "load", load=speeds.load),
        "answers": phases.measured_answers(speeds, prompts, slots),
    }
    # One cache for all; each plan says what it takes to write.
    found["features"] = next(iter(plans.values())).sections["time"]["features"]
    for name, plan in plans.items():
        parts = plan.sections["time"]
        found[f"training {name}"] = figure(
            "s",
            "training + held_out + setup",
            training=parts["training"],
            held_out=parts["held-out evaluation"],
            setup=parts["setup and checkpoints"],
        )
    tau = {name: training_tau(plan.recipe) for name, plan in plans.items()} | {"prompt lookup": LOOKUP_TAU}
    each = [min(length, new_tokens) for length in phases.stretched(speeds.answers, max(tasks))]
    # A prompt by every method in turn; each method begins with a short answer, to warm up.
    found["evaluation"] = figure(
        "s",
        "(tasks + temperatures) * methods * prefill + (tasks * tokens + temperatures * warm_up) * token",
        tasks=sum(tasks),
        temperatures=len(tasks),
        tokens=sum(each) / len(each),
        warm_up=min(WARM_UP_TOKENS, new_tokens),
        methods=len(speeds.methods),
        prefill=speeds.prompt,
        token=sum(seconds / tau.get(name, 1.0) for name, seconds in speeds.methods.items()),
    )
    return found
