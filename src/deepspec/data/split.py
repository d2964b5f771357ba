"""Train, select and test: three sets that share no question, whatever happens to the file in between.

Where a row goes depends on its normalised opening question alone (`holdout_bucket`): another order, another
run, a copy, another spelling, a longer conversation that opens alike, all fall into the same set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from deepspec.data.conversations import (
    Conversation,
    holdout_bucket,
    line_of,
    normalise,
    opening_question,
    read_conversations,
)
from deepspec.data.lines import Skipped
from deepspec.data.sources import BAR_ROWS, nothing_left
from deepspec.data.unique import Unique
from deepspec.errors import DataError
from deepspec.files import atomic_file
from deepspec.log import progress, warn

SETS = ("train", "select", "test")


@dataclass
class Split:
    """Rows of each set that was written, prompts that came again, and questions found in two sets (none)."""

    rows: dict[str, int] = field(default_factory=dict)
    repeats: int = 0
    overlap: int = 0


def set_of(conversation: Conversation, select: float, test: float) -> str:
    """The row's set, for shares of select and test. Another share of select never moves a test row."""
    bucket = holdout_bucket(opening_question(conversation))
    return "test" if bucket < test else "select" if bucket < test + select else "train"


def split(
    path: Path,
    out: Path,
    *,
    select: float = 0.01,
    test: float = 0.04,
    drop_repeats: bool = False,
    skipped: Skipped | None = None,
) -> Split:
    """Write `out`/train.jsonl, select.jsonl and test.jsonl, all three or none; a share of 0 makes no file.

    Rows keep their order. A prompt that comes again stays in its prompt's set, under an id of its own, or is
    dropped (`drop_repeats`). The written files are read again and compared before they get their names.
    Raises DataError for impossible shares, a bad row, an id that comes twice, or a file that would be
    written over by mistake.
    """
    files = {name: out / f"{name}.jsonl" for name in _wanted(select, test, out)}
    if path.resolve() in [file.resolve() for file in files.values()]:
        raise DataError(
            "the split would write over what it reads", where=str(path), next_step="another --out"
        )
    done = Split(dict.fromkeys(files, 0))
    with ExitStack() as stack:
        unique = stack.enter_context(Unique(drop_repeats=drop_repeats))
        streams = {name: stack.enter_context(atomic_file(file)) for name, file in files.items()}
        with progress("splitting rows", None) as bar:
            for row in unique.rows(read_conversations(path, skipped=skipped), skipped):
                name = set_of(row, select, test)
                streams[name].write(line_of(row))
                done.rows[name] += 1
                if sum(done.rows.values()) % BAR_ROWS == 0:
                    bar.update(BAR_ROWS, **done.rows)
        if not any(done.rows.values()):
            raise nothing_left(skipped)
        for stream in streams.values():
            stream.flush()
        done.repeats = unique.repeats
        done.overlap = overlap({name: Path(stream.name) for name, stream in streams.items()})
        assert not done.overlap, f"{done.overlap} questions in two sets"
    for name, file in files.items():
        if not done.rows[name]:
            warn(f"{file} is empty: too few questions for its share")
    return done


def overlap(files: dict[str, Path]) -> int:
    """How many opening questions of one file, normalised, are in another one too. The largest file is read
    row by row; of the others a hash of every question is held in memory."""
    largest = max(files, key=lambda name: files[name].stat().st_size)
    seen: set[bytes] = set()
    shared: set[bytes] = set()
    with progress("comparing sets", len(files)) as bar:
        for name in sorted(files, key=lambda name: name == largest):
            own = _questions(read_conversations(files[name]))
            if name == largest:
                shared.update(question for question in own if question in seen)
            else:
                held = set(own)
                shared |= held & seen
                seen |= held
            bar.update(1)
    return len(shared)


def _questions(rows: Iterable[Conversation]) -> Iterator[bytes]:
    for row in rows:
        yield hashlib.sha256(normalise(opening_question(row)).encode()).digest()[:16]


def _wanted(select: float, test: float, out: Path) -> list[str]:
    """The sets that get a file."""
    shares = {"train": 1 - select - test, "select": select, "test": test}
    if not (0 <= select < 1 and 0 <= test < 1 and shares["train"] > 0):
        raise DataError(
            f"shares of {select:g} (select) and {test:g} (test) leave nothing to train on",
            next_step="each from 0, together below 1",
        )
    for name, share in shares.items():
        # An older file of that name would look like part of this split, and may hold what train now holds.
        if not share and (stale := out / f"{name}.jsonl").exists():
            raise DataError(
                f"{stale.name} is there from before, and a share of 0 makes none",
                where=str(stale),
                next_step="move it away, give another --out, or give it a share",
            )
    return [name for name in SETS if shares[name]]
