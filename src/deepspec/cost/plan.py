"""A plan: what a recipe takes before anything runs, each figure with its formula, and whether it fits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from deepspec.cost.formulas import Figure, body_weights, draft_parameters, figure, target_parameters, total
from deepspec.cost.inputs import Inputs
from deepspec.cost.sizes import Need, disk_figures, host_figures, memory_figures, micro_rows, needs_of
from deepspec.cost.step_time import ASSUMED_TAU, FromRow, StepTime, operations
from deepspec.errors import RecipeError

LINK = 100e9
"""Bytes per second between the accelerators of a host: an assumption, below NVLink and above PCIe."""


@dataclass(frozen=True)
class Plan:
    """Figures by section and name; what has to fit; what was assumed."""

    inputs: Inputs
    sections: dict[str, dict[str, Figure]]
    needs: tuple[Need, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return all(need.fits for need in self.needs)

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        inputs = self.inputs
        return {
            "recipe": inputs.recipe.name,
            "target": inputs.recipe.target,
            "machine": inputs.machine._asdict(),
            "features": inputs.features,
            "sections": {
                title: {name: one.plain() for name, one in figures.items()}
                for title, figures in self.sections.items()
            },
            "needs": [{**need._asdict(), "fits": need.fits} for need in self.needs],
            "fits": self.fits,
            "notes": list(self.notes),
        }


def make_plan(inputs: Inputs, source: StepTime | None = None) -> Plan:
    """The plan of a recipe. source: of seconds; the machine's row if None.

    Raises RecipeError if the recipe describes no draft for its target, DataError if no row is left.
    """
    names, source = inputs.names, source or FromRow(inputs.machine)
    if inputs.gpus > 1:
        check_gpus(inputs)
    memory, (steps, seconds) = memory_figures(inputs), time_figures(inputs, source)
    sections = {
        "parameters": {
            "target": target_parameters(names),
            "of them, passed by a token": body_weights(names, names["chosen"]),
            "draft's own": draft_parameters(names),
        },
        "data": {
            "rows": figure("rows", "rows", names),
            "tokens": figure("tokens", "prompts + answers", names),
            "prompt tokens": figure("tokens", "prompts", names),
            "answer tokens": figure("tokens", "answers", names),
            "supervised share": figure("", "answers / tokens", names),
            "tokens computed per token": figure("", "padding", names),
            "optimiser steps": steps,
        },
        "disk": disk_figures(inputs),
        "memory of the accelerator" if inputs.machine.memory else "memory of the model": memory,
        "memory of the host": host_figures(inputs, memory),
        "operations": operations(inputs),
        "time": seconds,
    }
    notes = [
        *inputs.counts.notes,
        *source.notes(inputs),
        f"held-out evaluations are assumed to reach τ {ASSUMED_TAU:g}",
    ]
    if watts := inputs.machine.watts:
        formula = "seconds * watts / 3600000"
        watts *= inputs.gpus
        notes.append(f"energy is counted at {watts:.0f} W")
        sections["energy"] = {
            name: figure("kWh", formula, seconds=spent, watts=watts) for name, spent in seconds.items()
        }
    else:
        notes.append("there is no energy: this machine has no meter that can be read; --watts sets its power")
    return Plan(inputs, sections, needs_of(inputs), tuple(notes))


def check_gpus(inputs: Inputs) -> None:
    """Raise RecipeError if several accelerators cannot share the recipe's batches, or there are none."""
    size = inputs.recipe.optim.batch_size
    if inputs.machine.memory is None:
        raise RecipeError(
            f"--gpus {inputs.gpus}: {inputs.machine.name} has no accelerator",
            next_step="name a machine with one, such as --machine h100",
        )
    if size % inputs.gpus:
        raise RecipeError(
            f"optim.batch_size is {size} sequences, which {inputs.gpus} accelerators cannot share evenly",
            where=inputs.recipe.name,
            next_step=f"choose a number that divides {size}, or another optim.batch_size",
        )


def time_figures(inputs: Inputs, source: StepTime) -> tuple[Figure, dict[str, Figure]]:
    """(optimiser steps, seconds by phase)."""
    recipe, cached = inputs.recipe, inputs.features == "cache"
    features, draft = (
        _shared(inputs, each) for each in (source.features_step(inputs), source.draft_step(inputs))
    )
    if (offloaded := source.offloaded_step(inputs)) is not None:
        draft = figure("s", "each + offloaded", each=draft, offloaded=offloaded)
    if inputs.gpus > 1:
        draft = figure("s", "each + summing", each=draft, summing=summing(inputs))
    steps = optimiser_steps(inputs, float(draft) + (0.0 if cached else float(features)))
    found: dict[str, Figure] = {}
    if not inputs.counts.answered:
        found["regeneration"] = source.answers(inputs)
    passes = figure("s", "steps * each", steps=steps, each=features)
    found["features"] = source.cache(inputs) if cached else passes
    found["training"] = figure("s", "steps * each", steps=steps, each=draft)
    if overhead := source.overhead(inputs, float(steps)):
        found["loading, setup and checkpoints"] = overhead
    times = math.ceil(float(steps) / recipe.eval_every_steps)
    found["held-out evaluation"] = figure(
        "s", "times * one", times=times, one=_shared(inputs, source.held_out(inputs))
    )
    return steps, found | {"all": total(found)}


def _shared(inputs: Inputs, seconds: Figure) -> Figure:
    """Seconds of work that all accelerators share."""
    return seconds if inputs.gpus == 1 else figure("s", "each / gpus", each=seconds, gpus=inputs.gpus)


def summing(inputs: Inputs) -> Figure:
    """Seconds of a step in which the gradients are summed over the accelerators, in float32. If the draft is
    split over them, each micro-batch gathers its weights and sums its gradients."""
    recipe, gpus = inputs.recipe, inputs.gpus
    if not recipe.shard_draft:
        formula = "2 * 4 * own * (gpus - 1) / gpus / link"
        return figure("s", formula, inputs.names, gpus=gpus, link=LINK)
    passes = math.ceil(recipe.optim.batch_size / gpus / micro_rows(inputs))
    formula = "passes * (draft_width + 4) * own * (gpus - 1) / gpus / link"
    return figure("s", formula, inputs.names, passes=passes, gpus=gpus, link=LINK)


def optimiser_steps(inputs: Inputs, step: float) -> Figure:
    """Steps until the first of the recipe's limits. step: seconds of one."""
    recipe = inputs.recipe
    limit, minutes = recipe.total_steps(math.ceil(inputs.names["rows"])), recipe.optim.max_minutes
    if minutes is None:
        return figure("steps", "limit", limit=limit or 0)
    if limit is None:
        return figure("steps", "ceil(60 * minutes / step)", minutes=minutes, step=step)
    return figure("steps", "min(limit, ceil(60 * minutes / step))", limit=limit, minutes=minutes, step=step)
