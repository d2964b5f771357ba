"""What can go wrong for a person at the keyboard, as one small tree.

    Exception
    └── UserError            something the user can put right; printed without a traceback
        ├── RecipeError      a recipe file, or a `key=value` override, does not say something possible
        ├── DataError        a data file or record cannot be used as it stands
        ├── CheckpointError  a checkpoint is missing, torn, or of another kind
        ├── TargetError      a target model cannot be found, opened, or drafted for
        ├── ServerError      a server cannot be reached, or answers otherwise than it was asked to
        └── MismatchError    a draft does not fit the target it is asked to run with

Anything outside this tree is a bug in the program and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate spelt most like `name`, letter case aside; None when nothing comes close."""
    by_folded = {candidate.casefold(): candidate for candidate in candidates}
    close = get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.5)
    return by_folded[close[0]] if close else None


class UserError(Exception):
    """A problem the user can mend: what went wrong, where it was found, and what to do next.

    `str()` gives one line for each part that is known:

        what
          where: …
          next: …
    """

    def __init__(self, what: str, *, where: str | None = None, next_step: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.next_step = next_step

    def __str__(self) -> str:
        lines = [self.what]
        if self.where is not None:
            lines.append(f"  where: {self.where}")
        if self.next_step is not None:
            lines.append(f"  next: {self.next_step}")
        return "\n".join(lines)


class RecipeError(UserError):
    """A recipe, or an override of one, cannot be followed."""


class DataError(UserError):
    """A data file or record cannot be used."""


class CheckpointError(UserError):
    """A checkpoint cannot be read or is not what it should be."""


class TargetError(UserError):
    """A target model cannot be found, opened, or served by this program."""


class ServerError(UserError):
    """A server cannot be reached, or does not answer as it was asked to."""


class MismatchError(UserError):
    """A draft and a target do not belong together."""
