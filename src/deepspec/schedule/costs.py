"""What a round of decoding takes on one machine, as a table that `deepspec profile` measures.

A rows in flight, B new tokens per row, C tokens held per row: the three axes of the grid. R rows, T new
tokens of all rows together.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepspec.errors import DataError, MismatchError
from deepspec.files import write_json
from deepspec.schedule.policies import Floats, RoundSeconds, Seconds

FORMAT = 1
CONTEXT = 16
"""Tokens of context that policies do not tell apart."""
AGAIN = "measure it: deepspec profile DRAFT --target TARGET --out FILE"


@dataclass(frozen=True)
class Identity:
    """What the seconds of a table are of. Nothing that is None is known: a server tells little of itself.

    machine: as `this_machine` names it, or an address. source: "measured", "server" or "estimate".
    target_hash: of the target's config; draft_hash: of the draft's weights; block: γ.
    """

    machine: str
    source: str = "measured"
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    target: str | None = None
    target_hash: str | None = None
    draft: str | None = None
    draft_hash: str | None = None
    block: int | None = None


@dataclass(frozen=True, eq=False)
class StepCosts:
    """Seconds of a round's parts, by rows in flight, new tokens and context.

    rows [A], widths [B] from 1, contexts [C]: rising. target [A, B, C]: one pass of the target over
    rows × width new tokens, logits included. propose [A, C]: what a draft adds to a round apart from a wider
    pass (its proposals, `observe`, deciding on them); None without a draft. prefill_lengths [P], prefill [P]:
    reading one prompt, its first token included; observe [P]: what a draft adds to that. rest [A]:
    everything else in a plain round. watts: the mean power while the target decoded; None without a meter.
    notes: what is not measured. ragged: what a pass takes more if its rows' shares differ, as a share of the
    way to the pass in which all rows have the largest one.
    """

    rows: NDArray[np.int64]
    widths: NDArray[np.int64]
    contexts: NDArray[np.int64]
    target: Floats
    propose: Floats | None
    prefill_lengths: NDArray[np.int64]
    prefill: Floats
    rest: Floats
    identity: Identity
    watts: float | None = None
    notes: tuple[str, ...] = ()
    observe: Floats | None = None
    ragged: float = 0.0

    def pass_seconds(self, rows: ArrayLike, tokens: ArrayLike, context: ArrayLike) -> Floats:
        """One pass of the target with T new tokens in R rows that hold `context` tokens each; elementwise.

        The rows' shares may be ragged: a pass takes what as many tokens in equal shares take. Linear between
        the points of the table and beyond its last ones; as at its first ones below them.
        """
        rows, tokens, context = np.broadcast_arrays(*(np.asarray(x, float) for x in (rows, tokens, context)))
        points = (rows, tokens / np.maximum(rows, 1), context)
        return interpolated((self.rows, self.widths, self.contexts), self.target, points)

    def propose_seconds(self, rows: ArrayLike, context: ArrayLike) -> Floats:
        """The proposals of one round; elementwise. 0 in a table without a draft."""
        points = tuple(np.broadcast_arrays(*(np.asarray(x, float) for x in (rows, context))))
        if self.propose is None:
            return np.zeros(points[0].shape)
        return interpolated((self.rows, self.contexts), self.propose, points)

    def prefill_seconds(self, length: ArrayLike, drafted: bool = True) -> Floats:
        """Reading one prompt of so many tokens. drafted: whether a draft observes it."""
        read = interpolated((self.prefill_lengths,), self.prefill, (np.asarray(length, float),))
        return read + self.observe_seconds(length) if drafted else read

    def observe_seconds(self, length: ArrayLike) -> Floats:
        """A draft's first reading of so many tokens of one row. 0 in a table without a draft."""
        points = np.asarray(length, float)
        if self.observe is None:
            return np.zeros(points.shape)
        return interpolated((self.prefill_lengths,), self.observe, (points,))

    def rest_seconds(self, rows: ArrayLike) -> Floats:
        """Everything in a round but the target's pass and the proposals."""
        return interpolated((self.rows,), self.rest, (np.asarray(rows, float),))

    def round_seconds(
        self, rows: ArrayLike, tokens: ArrayLike, context: ArrayLike, drafted: bool = True
    ) -> Floats:
        """A whole round that verifies T tokens, anchors included. drafted: whether the draft proposes."""
        proposals = self.propose_seconds(rows, context) if drafted else 0.0
        return self.pass_seconds(rows, tokens, context) + proposals + self.rest_seconds(rows)

    def record(self) -> dict[str, Any]:
        """The table as JSON data."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        listed = {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in found.items()}
        return listed | {"format": FORMAT, "identity": asdict(self.identity)}

    def rounds(self) -> Seconds:
        """What a round takes, as the policies ask it: looked up once per rows and `CONTEXT` tokens."""

        @lru_cache(maxsize=4096)
        def at(rows: int, context: float, count: int) -> RoundSeconds:
            axes, points = (self.rows, self.contexts), (np.asarray(float(rows)), np.asarray(context))
            line = np.array([interpolated(axes, self.target[:, i], points) for i in range(len(self.widths))])
            widths = 1.0 + np.arange(count + 1) / rows
            rest = float(self.rest_seconds(rows))
            drafted = interpolated((self.widths,), line, (widths,)) + rest
            return RoundSeconds(
                float(interpolated(axes, self.target[:, 0], points)) + rest,
                drafted + float(self.propose_seconds(rows, context)),
                float(self.observe_seconds(context)) * rows,
                self.ragged,
            )

        return lambda load, count: at(load.rows, (load.context // CONTEXT + 0.5) * CONTEXT, count)


def interpolated(axes: Sequence[NDArray[Any]], table: Floats, points: Sequence[Floats]) -> Floats:
    """A table's value at points, one array per axis: linear between grid points and beyond the last (never
    falling there), as at the first below it."""
    indices, weights = zip(
        *(_placed(axis, point) for axis, point in zip(axes, points, strict=True)), strict=True
    )
    found = np.zeros(points[0].shape)
    for corner in np.ndindex(*(2,) * len(axes)):
        share = np.ones(points[0].shape)
        at = []
        for axis, index, weight, upper in zip(axes, indices, weights, corner, strict=True):
            share = share * (weight if upper else 1.0 - weight)
            at.append(np.minimum(index + upper, len(axis) - 1))
        found += share * table[tuple(at)]
    return found


def _placed(axis: NDArray[Any], point: Floats) -> tuple[NDArray[np.int64], Floats]:
    """(the grid point below, the way from there to the next one; more than 1 beyond the last)."""
    if len(axis) == 1:
        return np.zeros(point.shape, np.int64), np.zeros(point.shape)
    index = np.clip(np.searchsorted(axis, point, side="right") - 1, 0, len(axis) - 2)
    return index, np.maximum((point - axis[index]) / (axis[index + 1] - axis[index]), 0.0)


def monotone(table: Floats) -> Floats:
    """The mean of the table's two monotone envelopes: the smallest table that rises along every axis and lies
    nowhere below it, and the largest that lies nowhere above it.

    A larger step is never quicker, so a fall is noise. One envelope alone would follow only the slow
    measurements, or only the quick ones.
    """
    above, below = table, table
    for axis in range(table.ndim):
        above = np.maximum.accumulate(above, axis)
        below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis), axis)
    return (above + below) / 2


def write_costs(path: Path, costs: StepCosts) -> None:
    """Write a table as a JSON file, whole or not at all."""
    write_json(path, costs.record())


def read_costs(
    path: Path, *, target: str | None = None, draft: str | None = None, machine: str | None = None
) -> StepCosts:
    """Read a table of `deepspec profile`.

    target, draft: hashes, machine: a name, of what the table has to belong to; None for whatever it is of.
    Raises DataError for another file, MismatchError for a table of another machine, target or draft.
    """
    try:
        record = json.loads(path.read_text("utf-8"))
        if record.pop("format") != FORMAT:
            raise ValueError("its format is another version's")
        costs = _from_record(record)
    except OSError as error:
        raise DataError("there is no such table of step costs", where=str(path), next_step=AGAIN) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"this is not a table of `deepspec profile`: {error}", where=str(path), next_step=AGAIN
        ) from error
    of = costs.identity
    for what, named, found, wanted in (
        ("machine", of.machine, of.machine, machine),
        ("target", of.target, of.target_hash, target),
        ("draft", of.draft or "none", of.draft_hash, draft),
    ):
        if wanted is not None and found != wanted:
            here = f"; this one is {wanted}" if what == "machine" else ", or of other weights or settings"
            raise MismatchError(
                f"these step costs are of another {what} ({named}){here}", where=str(path), next_step=AGAIN
            )
    return costs


def _from_record(record: dict[str, Any]) -> StepCosts:
    """Raises ValueError, LookupError, TypeError for what no table holds."""
    rows, widths, contexts, lengths = (
        _rising(record, name) for name in ("rows", "widths", "contexts", "prefill_lengths")
    )
    a, b, c = map(len, (rows, widths, contexts))
    if rows[0] < 1 or widths[0] != 1:
        raise ValueError("'rows' begin below 1, or 'widths' do not begin with 1")
    return StepCosts(
        rows,
        widths,
        contexts,
        _seconds(record, "target", (a, b, c)),
        None if record["propose"] is None else _seconds(record, "propose", (a, c)),
        lengths,
        _seconds(record, "prefill", (len(lengths),)),
        _seconds(record, "rest", (a,)),
        Identity(**record["identity"]),
        record.get("watts"),
        tuple(record.get("notes", ())),
        None if record.get("observe") is None else _seconds(record, "observe", (len(lengths),)),
        float(record.get("ragged", 0.0)),
    )


def _rising(record: dict[str, Any], name: str) -> NDArray[np.int64]:
    axis = np.array(record[name], np.int64)
    if axis.ndim != 1 or not len(axis) or axis[0] < 0 or (np.diff(axis) <= 0).any():
        raise ValueError(f"'{name}' does not rise")
    return axis


def _seconds(record: dict[str, Any], name: str, shape: tuple[int, ...]) -> Floats:
    table = np.array(record[name], float)
    least = table.min(initial=np.inf) if table.shape == shape and np.isfinite(table).all() else -1.0
    if least < 0 or (name == "target" and least == 0):
        raise ValueError(f"'{name}' is not a table of seconds of shape {list(shape)}")
    return table
