"""Bad rows: a command stops at the first one, or leaves them out and counts them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from deepspec.errors import DataError


@dataclass
class Skipped:
    """Bad rows that were left out: how many, for which reasons, and where the first `shown` of them are."""

    shown: int = 5
    count: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    places: list[str] = field(default_factory=list)

    def add(self, error: DataError) -> None:
        """Count a bad row instead of stopping at it."""
        self.count += 1
        # "message 2 is user after user" and "message 4 is …" are one reason. A file full of different errors
        # must not fill the memory with reasons.
        reason = re.sub(r"(?<![\w-])\d+\b", "N", error.what)[:200]
        self.reasons[reason if reason in self.reasons or len(self.reasons) < 100 else "other reasons"] += 1
        if len(self.places) < self.shown:
            self.places.append(f"{error.where}: {error.what}" if error.where else error.what)

    def lines(self) -> list[str]:
        """The report for a person: the count, the count of each reason, and the first places."""
        if not self.count:
            return []
        reasons = [f"  {count} × {reason}" for reason, count in self.reasons.most_common(10)]
        places = [f"  {place}" for place in self.places]
        return [f"skipped {self.count} bad rows:", *reasons, "the first of them:", *places]

    def as_json(self) -> dict[str, Any]:
        return {"count": self.count, "reasons": dict(self.reasons.most_common()), "first": self.places}


class SkipNothing(Skipped):
    """For commands that were not asked to skip: stops at the first bad row and names the option."""

    def add(self, error: DataError) -> None:
        option = "--skip-bad leaves such rows out and counts them"
        step = f"{error.next_step}; or {option}" if error.next_step else option
        raise DataError(error.what, where=error.where, next_step=step) from error.__cause__


def refuse(error: DataError, skipped: Skipped | None) -> None:
    """Count a bad row in `skipped`; without it, raise the row's error."""
    if skipped is None:
        raise error
    skipped.add(error)


def nothing_left(skipped: Skipped | None, source: str | None) -> DataError:
    """The error for a source without a single usable row."""
    if not skipped or not skipped.count:
        return DataError(
            "there are no rows: the source is empty",
            where=source,
            next_step="check that this is the source that you meant, and that it was written to its end",
        )
    return DataError(
        f"no rows left: all {skipped.count} were bad; the first: {skipped.places[0]}",
        where=source,
        next_step="say which column is which: deepspec data download FILE --map prompt=COLUMN (docs/data.md)",
    )
