"""Generated arithmetic word problems with worked answers: the `math` domain of the pocket target.

A problem is one to three small operations told as a story. The worked answer writes out every operation, so
that a model of five million parameters can get it right and a reader can check it. The numbers are small on
purpose: the domain exists so that acceptance has a meaning, not to teach arithmetic.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

NAMES = tuple(
    "Ada Alan Amir Anna Ben Bruno Carla Chen Clara Dana David Elena Emil Eva Farid Grace Hana Hugo "  # noqa: SIM905
    "Ines Ivan Jack Julia Kenji Lara Leo Lina Lucas Maria Maya Mila Nadia Nina Noah Nora Omar Oscar "
    "Paula Petra Priya Rosa Ruth Sam Sara Sofia Tom Vera Viktor Wei Yusuf Zoe".split()
)
THINGS = tuple(
    "apples beads books bottles boxes bricks buttons cakes candles cards chairs coins cookies cups "  # noqa: SIM905
    "eggs flowers lamps lemons letters marbles melons nails oranges pears pencils plates plums ropes "
    "shells stamps stickers stones tickets tiles toys".split()
)
CONTAINERS = ["bags", "baskets", "boxes", "crates", "drawers", "jars", "packs", "rows", "shelves", "trays"]


@dataclass(frozen=True)
class Step:
    """One operation of a story: the event, and the sentence that computes its result."""

    event: str
    working: str
    symbol: str
    operand: int


@dataclass(frozen=True)
class Problem:
    question: str
    worked: str
    """The answer without thinking: one sentence per operation, then the result."""
    notes: str
    """The same steps in shorthand, for the thinking block."""
    result: int

    @property
    def short(self) -> str:
        """The answer that follows a thinking block."""
        return f"The answer is {self.result}."


def _gain(rng: random.Random, name: str, thing: str, have: int) -> tuple[Step, int]:
    n = rng.randint(2, 40)
    event, verb = rng.choice(
        [
            (f"{name} buys {n} more {thing}.", "After buying more"),
            (f"{name} finds {n} {thing}.", "After finding some"),
            (f"A friend gives {name} {n} {thing}.", "With the gift"),
        ]
    )
    return Step(event, f"{verb}, {name} has {have} + {n} = {have + n} {thing}.", "+", n), have + n


def _loss(rng: random.Random, name: str, thing: str, have: int) -> tuple[Step, int]:
    n = rng.randint(1, min(have - 1, 40))
    event, verb = rng.choice(
        [
            (f"{name} gives away {n} {thing}.", "After giving some away"),
            (f"{name} loses {n} {thing}.", "After losing some"),
            (f"{name} sells {n} {thing}.", "After selling some"),
        ]
    )
    return Step(event, f"{verb}, {name} has {have} - {n} = {have - n} {thing}.", "-", n), have - n


def _times(rng: random.Random, name: str, thing: str, have: int) -> tuple[Step, int]:
    n = rng.randint(2, 5 if have <= 12 else 3)
    word = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}[n]
    event = f"The next day {name} has {word} as many {thing}."
    return Step(event, f"The next day, {name} has {have} * {n} = {have * n} {thing}.", "*", n), have * n


def _share(rng: random.Random, name: str, thing: str, have: int) -> tuple[Step, int] | None:
    divisors = [n for n in range(2, 10) if have % n == 0 and have // n >= 2]
    if not divisors:
        return None
    n = rng.choice(divisors)
    container = rng.choice([c for c in CONTAINERS if c != thing])
    event = f"{name} puts all the {thing} into {n} equal {container} and keeps one of them."
    return Step(event, f"Each holds {have} / {n} = {have // n} {thing}.", "/", n), have // n


def problem(rng: random.Random) -> Problem:
    """Draw one problem. Every intermediate value is a positive integer."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    start = have = rng.randint(3, 40)
    if rng.random() < 0.3:
        packs, each = rng.randint(2, 9), rng.randint(2, 9)
        container = rng.choice([c for c in CONTAINERS if c != thing])
        opening = f"{name} has {packs} {container} with {each} {thing} in each."
        start = have = packs * each
        worked = [f"{name} starts with {packs} * {each} = {have} {thing}."]
        notes = [f"{packs} * {each} = {have}"]
    else:
        opening = f"{name} has {start} {thing}."
        worked = [f"{name} starts with {start} {thing}."]
        notes = [f"start {start}"]
    events = [opening]
    for _ in range(rng.choice([1, 1, 2, 2, 2, 3])):
        makers = [_gain] if have < 2 else [_gain, _loss]
        if have <= 30:
            makers.append(_times)
        made = _share(rng, name, thing, have) if rng.random() < 0.15 else None
        step, after = made or rng.choice(makers)(rng, name, thing, have)
        events.append(step.event)
        worked.append(step.working)
        notes.append(f"{have} {step.symbol} {step.operand} = {after}")
        have = after
    ask = rng.choice([f"How many {thing} does {name} have now?", f"How many {thing} are there in the end?"])
    question = " ".join([*events, ask])
    return Problem(question, " ".join([*worked, f"The answer is {have}."]), "\n".join(notes), have)


def result_of(answer: str) -> int | None:
    """The number that an answer ends with (`The answer is 12.`), or None if it gives none."""
    found = re.findall(r"The answer is (-?\d+)", answer)
    return int(found[-1]) if found else None
