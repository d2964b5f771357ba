"""Where a plan does not fit: the cheapest change that makes it fit, found by planning again with each.

Cheapest first: what loses nothing (storing only what is read), what costs disk precision, what costs time
(features online, smaller micro-batches), what costs the draft something (anchors, length, layers), and last
another machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from deepspec.config import Recipe
from deepspec.cost.asked import Choices
from deepspec.cost.costs import BYTES
from deepspec.cost.counts import Counts
from deepspec.cost.figures import Plan, make_plan
from deepspec.cost.machines import MACHINES, Machine
from deepspec.errors import DataError


@dataclass(frozen=True)
class Setting:
    """What a plan is made from, and the words that led there from the user's own."""

    recipe: Recipe
    choices: Choices
    machine: Machine
    counts: Counts
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Change:
    """Words to add to the command, and the plan that they give. cost: what one pays for it."""

    words: tuple[str, ...]
    cost: str
    plan: Plan


class Way(NamedTuple):
    """What a change costs, and a setting changed so: None where it cannot be, or is so already."""

    cost: str
    step: Callable[[Setting], Setting | None]


def cheapest_change(
    plan: Plan, config: dict[str, Any], counts: Counts, machines: bool = True
) -> Change | None:
    """The first change that makes everything fit; where no single one does, several, none of them needless.

    machines: whether another machine may be named, where no change of the rest is enough. None where nothing
    here would do.
    """
    start = Setting(plan.recipe, plan.choices, plan.machine, counts)

    def planned(taken: Sequence[Way]) -> Plan | None:
        setting = changed(start, taken)
        if setting is None:
            return None
        try:
            return make_plan(setting.recipe, config, setting.counts, setting.machine, setting.choices)
        except DataError:
            return None  # cut so short that no row is left

    own, others = [*ladder()], [*other_machines()]
    for ways in [own, others, own + others] if machines else [own]:
        taken = next(([way] for way in ways if _fits(planned([way]))), None) or _several(plan, ways, planned)
        found = planned(taken)
        if found is not None and found.fits:
            return _change(start, taken, found)
    return None


def _fits(plan: Plan | None) -> bool:
    return plan is not None and plan.fits


def _several(plan: Plan, ways: Sequence[Way], planned: Callable[[Sequence[Way]], Plan | None]) -> list[Way]:
    """Changes taken in order, each only where it lowers what does not fit, less those made needless later."""
    taken: list[Way] = []
    for way in ways:
        found = planned([*taken, way])
        if found is not None and _less_over(found, plan):
            taken, plan = [*taken, way], found
        if plan.fits:
            break
    for way in [*taken]:
        fewer = [other for other in taken if other is not way]
        taken = fewer if _fits(planned(fewer)) else taken
    return taken


def changed(start: Setting, taken: Sequence[Way]) -> Setting | None:
    """The setting after all of them; None where one of them changes nothing."""
    setting: Setting | None = start
    for way in taken:
        setting = setting and way.step(setting)
    return setting


def _change(start: Setting, taken: Sequence[Way], plan: Plan) -> Change:
    setting = changed(start, taken)
    assert setting is not None
    costs = dict.fromkeys(way.cost for way in taken)
    return Change(setting.words, "; ".join(costs), plan)


def _less_over(new: Plan, old: Plan) -> bool:
    over = [{n.what: n.wants / n.has for n in p.needs if not n.fits} for p in (new, old)]
    return sum(over[0].values()) < sum(over[1].values())


# ── the ladder ────────────────────────────────────────────────────────────────────────────────────────


def ladder() -> Iterator[Way]:
    """Ways to need less on the same machine, cheapest first."""
    yield Way("nothing: positions that no loss reads are left out", _stored("positions", "read"))
    yield Way("some precision of the features", _stored("store", "fp8"))
    yield Way("the target's forward pass in every epoch", _stored("features", "online"))
    for batch in (8, 4, 2, 1):
        yield Way("fewer answers written at a time", _batch(batch))
    yield Way("smaller matrix products", _key("optim.micro_batch_size", 1))
    yield Way("rounded moments of the optimiser, and the bitsandbytes package", _narrow_states)
    yield Way("a coarser choice of the best checkpoint", _key("eval_prompts", 4))
    for anchors in (256, 128, 64):
        yield Way("fewer blocks learnt from in a sequence", _key("num_anchors", anchors))
    for length in (2048, 1536, 1024, 512):
        yield Way("longer answers are cut", _key("data.max_length", length))
    for layers in (3, 2, 1):
        yield Way("a smaller draft", _key("draft.num_layers", layers))
    for share in (2, 4, 10):
        yield Way("fewer rows to learn from", _rows(share))


def other_machines() -> Iterator[Way]:
    """Accelerators with more memory, the smallest first."""
    for name in MACHINES:
        yield Way("another machine", _machine(name))


def _stored(key: str, value: str) -> Callable[[Setting], Setting | None]:
    def step(setting: Setting) -> Setting | None:
        old = setting.choices
        smaller = key != "store" or BYTES[value] < BYTES[old.store]
        if old.features != "cache" or getattr(old, key) == value or not smaller:
            return None
        choices = replace(old, **{key: value})  # type: ignore[arg-type]
        return replace(setting, choices=choices, words=(*setting.words, f"--{key} {value}"))

    return step


def _batch(rows: int) -> Callable[[Setting], Setting | None]:
    """Fewer answers decoded together."""

    def step(setting: Setting) -> Setting | None:
        if setting.choices.batch <= rows:
            return None
        kept = [word for word in setting.words if not word.startswith("--batch ")]
        choices = replace(setting.choices, batch=rows)
        return replace(setting, choices=choices, words=(*kept, f"--batch {rows}"))

    return step


def _key(key: str, value: int) -> Callable[[Setting], Setting | None]:
    """A recipe's key set to a smaller value."""

    def step(setting: Setting) -> Setting | None:
        recipe = setting.recipe
        *section, last = key.split(".")
        place: Any = getattr(recipe, section[0]) if section else recipe
        now = getattr(place, last)
        if (now is not None and now <= value) or (key == "num_anchors" and recipe.algorithm == "eagle3"):
            return None
        lower: Any = place.model_copy(update={last: value})
        recipe = recipe.model_copy(update={section[0]: lower}) if section else lower
        # One word for a key: a smaller value takes the place of an earlier one.
        kept = [word for word in setting.words if not word.startswith(f"{key}=")]
        return replace(setting, recipe=recipe, words=(*kept, f"{key}={value}"))

    return step


def _narrow_states(setting: Setting) -> Setting | None:
    optim = setting.recipe.optim
    if optim.states == "8bit":
        return None
    recipe = setting.recipe.model_copy(update={"optim": optim.model_copy(update={"states": "8bit"})})
    return replace(setting, recipe=recipe, words=(*setting.words, "optim.states=8bit"))


def _rows(share: int) -> Callable[[Setting], Setting | None]:
    """One row in `share`."""

    def step(setting: Setting) -> Setting | None:
        rows = int(setting.counts.rows / share)
        kept = [word for word in setting.words if not word.startswith("--rows ")]
        return replace(setting, counts=setting.counts.of(rows), words=(*kept, f"--rows {rows}"))

    return step


def _machine(name: str) -> Callable[[Setting], Setting | None]:
    """A machine with more memory."""

    def step(setting: Setting) -> Setting | None:
        now, other = setting.machine, MACHINES[name]
        if other.memory is None or other.memory <= (now.memory or 0.0):
            return None
        kept = [word for word in setting.words if not word.startswith("--machine ")]
        return replace(setting, machine=other, words=(*kept, f"--machine {name}"))

    return step
