"""Train, select and test sets that share no question: a row's set follows from its opening one alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from deepspec.data.conversations import Conversation, line_of, opening_question, read_conversations
from deepspec.data.download import BAR_ROWS
from deepspec.data.identity import holdout_bucket
from deepspec.data.repeats import UniqueIds
from deepspec.data.skipping import Skipped, nothing_left
from deepspec.errors import DataError
from deepspec.files import atomic_file
from deepspec.log import progress, warn

SETS = ("train", "select", "test")


@dataclass
class Split:
    """Rows of each set that was written, and rows that repeat a prompt."""

    rows: dict[str, int] = field(default_factory=dict)
    repeats: int = 0


def set_of(conversation: Conversation, select: float, test: float) -> str:
    """The row's set, for shares of select and test. Changing the share of select never moves a test row."""
    bucket = holdout_bucket(opening_question(conversation))
    return "test" if bucket < test else "select" if bucket < test + select else "train"


def split(
    paths: Sequence[Path],
    out: Path,
    *,
    select: float = 0.01,
    test: float = 0.04,
    drop_repeats: bool = False,
    skipped: Skipped | None = None,
) -> Split:
    """Divide the files' rows among `out`/train.jsonl, select.jsonl and test.jsonl, all written or none.

    A share of 0 makes no file. Rows keep their order. A repeated prompt stays in its prompt's set, under an
    id of its own, or is dropped (`drop_repeats`). Raises DataError for impossible shares, a bad row, an id
    that comes twice, or a file that would be overwritten by mistake.
    """
    files = {name: out / f"{name}.jsonl" for name in _wanted(select, test, out)}
    written = [file.resolve() for file in files.values()]
    if own := next((path for path in paths if path.resolve() in written), None):
        raise DataError(
            "the split would overwrite a file that it reads", where=str(own), next_step="give another --out"
        )
    done = Split(dict.fromkeys(files, 0))
    unique = UniqueIds(drop_repeats=drop_repeats)
    with ExitStack() as stack:
        streams = {name: stack.enter_context(atomic_file(file)) for name, file in files.items()}
        bar = stack.enter_context(progress("splitting rows", None))
        rows = chain.from_iterable(read_conversations(path, skipped=skipped) for path in paths)
        for number, row in enumerate(unique.rows(rows, skipped), start=1):
            name = set_of(row, select, test)
            streams[name].write(line_of(row))
            done.rows[name] += 1
            if number % BAR_ROWS == 0:
                bar.update(BAR_ROWS, **done.rows)
        if not any(done.rows.values()):
            raise nothing_left(skipped, ", ".join(map(str, paths)))
    done.repeats = unique.repeats
    for name, count in done.rows.items():
        if not count:
            warn(f"{files[name]} is empty: there are too few questions for its share")
    return done


def _wanted(select: float, test: float, out: Path) -> list[str]:
    """The sets that get a file."""
    shares = {"train": 1 - select - test, "select": select, "test": test}
    if not (0 <= select < 1 and 0 <= test < 1 and shares["train"] > 0):
        raise DataError(
            f"shares of {select:g} (select) and {test:g} (test) leave nothing to train on",
            next_step="give shares of 0 or more that add up to less than 1",
        )
    for name in SETS:
        # An older file of that name would look like part of this split, and may hold rows of its train set.
        if not shares[name] and (stale := out / f"{name}.jsonl").exists():
            raise DataError(
                f"{stale.name} exists from an earlier split, and a share of 0 writes no new one",
                where=str(stale),
                next_step="move it away, give another --out, or give it a share",
            )
    return [name for name in SETS if shares[name]]
