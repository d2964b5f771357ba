"""The errors that a user can put right. Any other exception is a bug and keeps its traceback."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate whose spelling is closest to `name`, ignoring case; None if nothing is close."""
    by_folded = {candidate.casefold(): candidate for candidate in candidates}
    close = get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.5)
    return by_folded[close[0]] if close else None


def without_logins(text: str) -> str:
    """A text in which every address has lost its `user:password@`, to be shown or written. The http:// of a
    feature server may have been forgotten."""
    return re.sub(r"(\w+://|vllm:)(?:(?!\w+://)\S)*@", r"\1", text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; some libraries add paragraphs of advice."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def some_rows(names: Sequence[str]) -> str:
    """The ids of rows, to be shown: the first eight, and how many more there are."""
    some = [f"row {name!r}" for name in names[:8]]
    return ", ".join(some + ([f"{len(names) - 8} more"] if len(names) > 8 else []))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes: libraries wrap one another's errors."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class UserError(Exception):
    """A problem that the user can put right: what is wrong, where, and what to do next.

    `str()` gives one line for each part that is known, and shows no password of an address. It is printed
    without a traceback.
    """

    def __init__(self, what: str, *, where: str | None = None, next_step: str | None = None) -> None:
        super().__init__(without_logins(what))
        self.what = without_logins(what)
        self.where = where and without_logins(where)
        self.next_step = next_step and without_logins(next_step)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where is not None:
            lines.append(f"  where: {self.where}")
        if self.next_step is not None:
            lines.append(f"  next: {self.next_step}")
        return "\n".join(lines)


class RecipeError(UserError):
    """A recipe, or an override of one of its values, is not valid."""


class DataError(UserError):
    """A data file or a record in it cannot be used."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, or is not what it should be."""


class TargetError(UserError):
    """A target model cannot be found or loaded, or cannot have a draft."""


class ServerError(UserError):
    """A server cannot be reached, or its answer is not what was asked for."""


class RankError(UserError):
    """Another process of the same training job ended, or does not answer."""


class MismatchError(UserError):
    """A draft does not fit its target."""


class NonFiniteError(TargetError):
    """Infinities or NaN where numbers belong: nothing may be learnt, drawn or written from them.

    who: the target, a draft, or a step of training. what: which of its numbers. rows: ids of those at fault.
    """

    OF_TARGET = (
        "load the target in bfloat16 or float32 (float16 overflows in some models), or leave the row out; if "
        "every row gives them, the weights are damaged: copy or download them again. A feature cache that "
        "holds them has to be written again"
    )
    OF_DRAFT = (
        "use an earlier checkpoint of the draft (in training: a lower optim.lr), or load the target in "
        "bfloat16 or float32: a draft runs in its target's number format"
    )
    OF_STEP = (
        "the checkpoints so far are unchanged: lower optim.lr, or leave the row out, and run the same "
        "command again to continue from the newest"
    )

    def __init__(self, who: str, what: str, rows: Sequence[str] = (), next_step: str = OF_TARGET) -> None:
        super().__init__(
            f"{who} gives infinities or NaN in {what}, from which nothing can be learnt or decoded",
            where=some_rows(rows) or None,
            next_step=next_step,
        )
        self.part, self.rows = what, tuple(rows)
