"""If a plan does not fit: the cheapest change that makes it fit, found by planning again with each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from deepspec.config import override
from deepspec.cost.inputs import Inputs
from deepspec.cost.machines import MACHINES
from deepspec.cost.sizes import Need, needs_of
from deepspec.errors import DataError, RecipeError


class Step(NamedTuple):
    """A word of the command, such as `--store fp8` or `num_anchors=64`, and what one pays for it."""

    key: str
    value: Any
    cost: str

    @property
    def word(self) -> str:
        return f"{self.key} {self.value}" if self.key.startswith("--") else f"{self.key}={self.value}"


class Change(NamedTuple):
    """Words to add to the command, what they cost, and what then has to fit."""

    words: tuple[str, ...]
    cost: str
    needs: tuple[Need, ...]


def ladder(inputs: Inputs) -> list[Step]:
    """Steps that need less on the same machine, cheapest first: what costs precision on disk, what costs
    time, what costs the draft something."""
    split = ["true"] if inputs.gpus > 1 else []
    fewer_rows = [max(int(inputs.counts.rows / share), 1) for share in (2, 4, 10)]
    choices: list[tuple[str, Sequence[Any], str]] = [
        ("--store", ["fp8"], "some precision of the features"),
        ("--features", ["online"], "the target's forward pass in every epoch"),
        ("--batch", [8, 4, 2, 1], "fewer answers written at a time"),
        ("optim.micro_batch_size", [1], "smaller matrix products"),
        ("shard_draft", split, "weights and gradients sent in every micro-batch"),
        ("shard_target", split, "the target's layers sent in every forward pass"),
        ("offload_optimizer", ["true"], "some tenths of a second in every step, and memory of the host"),
        ("optim.states", ["8bit"], "rounded moments of the optimiser, and the bitsandbytes package"),
        ("eval_prompts", [4], "a coarser choice of the best checkpoint"),
        ("num_anchors", [256, 128, 64], "fewer blocks learnt from in a sequence"),
        ("data.max_length", [2048, 1536, 1024, 512], "longer answers are cut"),
        ("draft.num_layers", [3, 2, 1], "a smaller draft"),
        ("--rows", fewer_rows, "fewer rows to learn from"),
    ]
    return [Step(key, value, cost) for key, values, cost in choices for value in values]


def applied(inputs: Inputs, step: Step) -> Inputs:
    """The inputs after a step. Raises RecipeError if the recipe does not allow it."""
    if step.key == "--machine":
        return replace(inputs, machine=MACHINES[step.value])
    if step.key == "--rows":
        return replace(inputs, counts=inputs.counts.of(step.value))
    if step.key.startswith("--"):  # the other options are fields of the inputs
        return replace(inputs, **{step.key[2:]: step.value})
    return replace(inputs, recipe=override(inputs.recipe, [step.word]))


def cheapest_change(inputs: Inputs) -> Change | None:
    """The first step that makes everything fit; if no single one does, several, none of them needless.

    Another machine is named only if no change of the rest is enough. None if nothing here would do.
    """
    own = ladder(inputs)
    others = [Step("--machine", row.name, "another machine") for row in MACHINES.values() if row.memory]
    for steps in (own, others, own + others):
        single = next(([step] for step in steps if _over(inputs, [step]) == 0), None)
        taken = single or _several(inputs, steps)
        if _over(inputs, taken) == 0:
            costs = dict.fromkeys(step.cost for step in taken)
            # A later, smaller value takes the place of an earlier one.
            words = {step.key: step.word for step in taken}
            return Change(tuple(words.values()), "; ".join(costs), _needs(inputs, taken))
    return None


def _several(inputs: Inputs, steps: Sequence[Step]) -> list[Step]:
    """Steps taken in order, each only if it lowers what does not fit, less those made needless later."""
    taken: list[Step] = []
    for step in steps:
        if _over(inputs, [*taken, step]) < _over(inputs, taken):
            taken.append(step)
    for step in [*taken]:
        fewer = [other for other in taken if other is not step]
        taken = fewer if _over(inputs, fewer) == 0 else taken
    return taken


def _needs(inputs: Inputs, taken: Sequence[Step]) -> tuple[Need, ...]:
    for step in taken:
        inputs = applied(inputs, step)
    return needs_of(inputs)


def _over(inputs: Inputs, taken: Sequence[Step]) -> float:
    """How far the plan is from fitting: the sum of wanted over available bytes of what does not fit."""
    try:
        needs = _needs(inputs, taken)
    except (DataError, RecipeError):
        return float("inf")  # no row is left, or the recipe does not allow it
    return sum(need.wants / need.has for need in needs if not need.fits)
