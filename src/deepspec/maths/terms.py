"""The terms of the loss, one row each: what a position is charged, and which way that pulls its logits.

With p the draft's distribution, t the teacher's (both over the draft's vocabulary) and x the label, every
term is a function of a few figures of its position, and its gradient by the logits is a sum of four
directions. Torch is not imported: recipes and drafts ask here which terms need the teacher.

    figure      what it is                          direction   what it is
    surprise    -log p[x]                           label       p - onehot(x)
    cross       -sum_v t log p                      teacher     p - t
    overlap     sum_v min(p, t)                     overlap     p (u - <p, u>), u = 1 where p < t, else 0
    reverse     sum_v p log(p / t)                  ratio       p (r - <p, r>), r = log(p / t)

Each direction is the gradient of the figure in its line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Figures = Mapping[str, Any]
"""Figures of positions by name: tensors of one shape."""

LK_ETA = 3.0
"""How fast `lk_lambda` turns from the cross-entropy to the overlap as the overlap grows: the paper's best."""


@dataclass(frozen=True)
class Term:
    """value: of the figures. slopes: direction -> its factor, a number or a function of the figures.
    teacher: whether it compares with the target's distribution, and not with the label alone."""

    value: Callable[[Figures], Any]
    slopes: Mapping[str, float | Callable[[Figures], Any]]
    reads: tuple[str, ...]

    @property
    def teacher(self) -> bool:
        return self.reads != ("surprise",)


def _of_cross(found: Figures) -> Any:
    return (-LK_ETA * found["overlap"]).exp()


TERMS = {
    "ce": Term(lambda f: f["surprise"], {"label": 1.0}, ("surprise",)),
    "kl": Term(lambda f: f["cross"], {"teacher": 1.0}, ("cross",)),
    "l1": Term(lambda f: 2.0 - 2.0 * f["overlap"], {"overlap": -2.0}, ("overlap",)),
    "reverse_kl": Term(lambda f: f["reverse"], {"ratio": 1.0}, ("reverse",)),
    "lk_alpha": Term(lambda f: -f["overlap"].log(), {"overlap": lambda f: -1.0 / f["overlap"]}, ("overlap",)),
    "lk_lambda": Term(
        lambda f: _of_cross(f) * f["cross"] + (1.0 - _of_cross(f)) * (1.0 - f["overlap"]),
        {"teacher": _of_cross, "overlap": lambda f: _of_cross(f) - 1.0},
        ("cross", "overlap"),
    ),
}
"""The terms by the name that recipes use (`loss.NAME`). Their formulas and sources: `losses.head_loss`."""


def figures_of(terms: Mapping[str, object]) -> set[str]:
    """The figures that some terms read."""
    return {figure for name in terms for figure in TERMS[name].reads}


def directions_of(terms: Mapping[str, object]) -> set[str]:
    """The directions of some terms' gradients."""
    return {direction for name in terms for direction in TERMS[name].slopes}
