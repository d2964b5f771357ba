"""If a plan does not fit: the cheapest change that makes it fit, found by planning again with each.

A change is the words that a user would add to the command. Cheapest first: what costs precision on disk, what
costs time (features online, fewer answers at a time, smaller micro-batches), what costs the draft something
(anchors, length, layers), and last another machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from deepspec.config import override
from deepspec.cost.inputs import Inputs
from deepspec.cost.machines import MACHINES
from deepspec.cost.sizes import Need, needs_of
from deepspec.errors import DataError, RecipeError


class Step(NamedTuple):
    """A word of the command, such as `--store fp8` or `num_anchors=64`, and what one pays for it."""

    word: str
    cost: str

    @property
    def key(self) -> str:
        return re.split("[ =]", self.word)[0]


class Change(NamedTuple):
    """Words to add to the command, what they cost, and what then has to fit."""

    words: tuple[str, ...]
    cost: str
    needs: tuple[Need, ...]


def ladder(inputs: Inputs) -> Iterator[Step]:
    """Steps that need less on the same machine, cheapest first."""
    yield Step("--store fp8", "some precision of the features")
    yield Step("--features online", "the target's forward pass in every epoch")
    for batch in (8, 4, 2, 1):
        yield Step(f"--batch {batch}", "fewer answers written at a time")
    yield Step("optim.micro_batch_size=1", "smaller matrix products")
    yield Step("optim.states=8bit", "rounded moments of the optimiser, and the bitsandbytes package")
    yield Step("eval_prompts=4", "a coarser choice of the best checkpoint")
    for anchors in (256, 128, 64):
        yield Step(f"num_anchors={anchors}", "fewer blocks learnt from in a sequence")
    for length in (2048, 1536, 1024, 512):
        yield Step(f"data.max_length={length}", "longer answers are cut")
    for layers in (3, 2, 1):
        yield Step(f"draft.num_layers={layers}", "a smaller draft")
    for share in (2, 4, 10):
        yield Step(f"--rows {max(int(inputs.counts.rows / share), 1)}", "fewer rows to learn from")


def other_machines() -> Iterator[Step]:
    """Accelerators, the smallest first."""
    yield from (Step(f"--machine {row.name}", "another machine") for row in MACHINES.values() if row.memory)


def applied(inputs: Inputs, word: str) -> Inputs:
    """The inputs after a word of the command. Raises RecipeError if the recipe does not allow it."""
    option, _, value = word.partition(" ")
    if option == "--machine":
        return replace(inputs, machine=MACHINES[value])
    if option == "--rows":
        return replace(inputs, counts=inputs.counts.of(int(value)))
    if option == "--batch":
        return replace(inputs, batch=int(value))
    if option == "--store":
        return replace(inputs, store=value)
    if option == "--features":
        return replace(inputs, features=value)
    return replace(inputs, recipe=override(inputs.recipe, [word]))


def cheapest_change(inputs: Inputs, machines: bool = True) -> Change | None:
    """The first step that makes everything fit; if no single one does, several, none of them needless.

    machines: whether another machine may be named if no change of the rest is enough. None if nothing here
    would do.
    """
    own, others = [*ladder(inputs)], [*other_machines()]
    for steps in [own, others, own + others] if machines else [own]:
        taken = next(([step] for step in steps if _over(inputs, [step]) == 0), None) or _several(
            inputs, steps
        )
        if _over(inputs, taken) == 0:
            words, costs = _words(taken), dict.fromkeys(step.cost for step in taken)
            return Change(words, "; ".join(costs), _needs(inputs, words))
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


def _words(taken: Sequence[Step]) -> tuple[str, ...]:
    """One word for each key: a later, smaller value takes the place of an earlier one."""
    return tuple({step.key: step.word for step in taken}.values())


def _needs(inputs: Inputs, words: Sequence[str]) -> tuple[Need, ...]:
    for word in words:
        inputs = applied(inputs, word)
    return needs_of(inputs)


def _over(inputs: Inputs, taken: Sequence[Step]) -> float:
    """How far the plan is from fitting: the sum of wanted over available bytes of what does not fit."""
    try:
        needs = _needs(inputs, _words(taken))
    except (DataError, RecipeError):
        return float("inf")  # no row is left, or the recipe does not allow it
    return sum(need.wants / need.has for need in needs if not need.fits)
