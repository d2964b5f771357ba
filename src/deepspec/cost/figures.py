"""What a recipe takes before anything runs: rows, bytes, memory, operations, hours and energy, each with its
formula, and whether it fits.

Pure: dimensions, recipe, counts and machine in, figures out. Nothing is loaded and nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deepspec.config import Recipe
from deepspec.cost import phases
from deepspec.cost.asked import Choices, ask
from deepspec.cost.costs import Figure, body_weights, draft_parameters, figure, number, target_parameters
from deepspec.cost.counts import Counts, Totals
from deepspec.cost.hours import time_figures, work_figures
from deepspec.cost.machines import Machine
from deepspec.cost.phases import Speeds
from deepspec.cost.room import Need, disk_figures, host_figures, memory_figures, needs_of


@dataclass(frozen=True)
class Plan:
    """Figures by section and name; what has to fit; what was assumed."""

    recipe: Recipe
    machine: Machine
    choices: Choices
    sections: dict[str, dict[str, Figure]]
    needs: tuple[Need, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return all(need.fits for need in self.needs)

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "recipe": self.recipe.name,
            "target": self.recipe.target,
            "machine": self.machine._asdict(),
            "features": self.choices.features,
            "sections": {
                title: {name: one.plain() for name, one in figures.items()}
                for title, figures in self.sections.items()
            },
            "needs": [need.plain() for need in self.needs],
            "fits": self.fits,
            "notes": list(self.notes),
        }


def make_plan(
    recipe: Recipe,
    config: dict[str, Any],
    counts: Counts,
    machine: Machine,
    choices: Choices | None = None,
    speeds: Speeds | None = None,
    tau: float = phases.ASSUMED_TAU,
) -> Plan:
    """config: the target's raw text config. speeds: of this machine, where it was measured.
    tau: what held-out evaluations are taken to accept.

    Raises RecipeError where the recipe describes no draft for that target, DataError where no row is left.
    """
    asked = ask(recipe, config, counts, machine, choices, speeds, tau)
    disk, memory = disk_figures(asked), memory_figures(asked)
    host, work = host_figures(asked, memory), work_figures(asked)
    steps, seconds = time_figures(asked, work)
    sections = {
        "parameters": {
            "target": target_parameters(asked.dims),
            "of them, passed by a token": body_weights(asked.dims, asked.dims.chosen),
            "draft's own": draft_parameters(asked.spec, asked.own),
        },
        "data": _data_figures(asked.size) | {"optimiser steps": steps},
        "disk": disk,
        "memory of the accelerator" if machine.memory else "memory of the model": memory,
        "memory of the host": host,
        "operations": work,
        "time": seconds,
    }
    notes = [*counts.notes, *_machine_notes(machine, speeds), f"held-out evaluations at τ {tau:g} (assumed)"]
    watts = machine.watts if speeds is None else speeds.watts or machine.watts
    if watts:
        sections["energy"] = {name: phases.energy(spent, watts) for name, spent in seconds.items()}
    else:
        notes.append("no energy: there is no meter here, and no --watts")
    needs = needs_of(asked, disk, memory, host)
    return Plan(recipe, machine, asked.choices, sections, needs, tuple(notes))


def _machine_notes(machine: Machine, speeds: Speeds | None) -> Iterator[str]:
    if speeds is not None:
        yield f"speeds measured on {speeds.machine}"
        if machine.memory is None and speeds.share < phases.QUIET:
            yield (
                f"it was busy: the measurement got {speeds.share:.0%} of a core, so the hours are "
                "a busy machine's; --measure again once it is quiet"
            )
        return
    yield (
        f"{machine.name}: {number(machine.bfloat16)} bfloat16 operations/s, of which {machine.share:.0%} "
        f"reached (assumed); {number(machine.bandwidth)} bytes/s, {machine.bandwidth_share:.0%} reached "
        "(assumed); "
        f"{machine.launch * 1e3:g} ms of Python per layer and decoding step in process (assumed)"
        + (f"; {machine.watts:g} W" if machine.watts else "")
    )


def _data_figures(size: Totals) -> dict[str, Figure]:
    return {
        "rows": figure("rows", "rows", rows=size.rows),
        "tokens": figure("tokens", "prompts + answers", prompts=size.prompts, answers=size.supervised),
        "prompt tokens": figure("tokens", "prompts", prompts=size.prompts),
        "answer tokens": figure("tokens", "answers", answers=size.supervised),
        "supervised share": figure("", "answers / tokens", answers=size.supervised, tokens=size.tokens),
        "tokens computed per token": figure("", "padded", padded=size.padded),
    }
