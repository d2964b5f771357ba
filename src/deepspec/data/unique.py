"""One id, one row; and which prompts came before. Kept in a temporary file, so memory stays flat.

A row's own id may come once. A row without one has its prompt's hash for an id (`prompt_id`), so a prompt
that comes again would come under the same id: it is kept, as `<hash>-2`, `<hash>-3`, … (a benchmark may ask
a question twice, a data set may answer one in several ways), or dropped where that is asked for.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import replace
from types import TracebackType

from deepspec.data.conversations import Conversation, prompt_id
from deepspec.data.lines import Skipped, refuse
from deepspec.errors import DataError

CACHE_KIB = 65536
"""Memory for the tables; what is beyond it lies in a temporary file (SQLITE_TMPDIR says where)."""


class Unique:
    """Passes rows on, each under an id of its own; `repeats` counts prompts that had come before."""

    def __init__(self, *, drop_repeats: bool = False) -> None:
        self.repeats = 0
        self._drop = drop_repeats
        self._tables = sqlite3.connect("", isolation_level=None)  # "": on disk, and gone when it is closed
        for line in (
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            f"PRAGMA cache_size = -{CACHE_KIB}",
            "CREATE TABLE ids (id TEXT PRIMARY KEY, place TEXT) WITHOUT ROWID",
            "CREATE TABLE prompts (prompt BLOB PRIMARY KEY, times INTEGER) WITHOUT ROWID",
            "BEGIN",
        ):
            self._tables.execute(line)

    def rows(self, rows: Iterable[Conversation], skipped: Skipped | None = None) -> Iterator[Conversation]:
        """`rows` in their order, ids made unique. Raises DataError, with both places, for a row's own id that
        came before, or counts that row in `skipped`."""
        for row in rows:
            prompt = prompt_id(row)
            times = self._times(prompt)
            self.repeats += times > 1
            if times > 1 and self._drop:
                continue
            if row.id == prompt or row.id.startswith(f"{prompt}-"):
                row = self._renamed(row, prompt, times)
            elif (first := self._place(row.id)) is not None:
                refuse(_twice(row, first), skipped)
                continue
            self._tables.execute("INSERT INTO ids VALUES (?, ?)", (row.id, row.source))
            yield row

    def _times(self, prompt: str) -> int:
        """How often the prompt has come, this time included."""
        key = (bytes.fromhex(prompt),)
        found = self._tables.execute("SELECT times FROM prompts WHERE prompt = ?", key).fetchone()
        if found is None:
            self._tables.execute("INSERT INTO prompts VALUES (?, 1)", key)
            return 1
        self._tables.execute("UPDATE prompts SET times = times + 1 WHERE prompt = ?", key)
        return int(found[0]) + 1

    def _place(self, row_id: str) -> str | None:
        """Where the id came first; None where it is new."""
        found = self._tables.execute("SELECT place FROM ids WHERE id = ?", (row_id,)).fetchone()
        return None if found is None else found[0] or "an earlier row"

    def _renamed(self, row: Conversation, prompt: str, times: int) -> Conversation:
        name = row.id
        while self._place(name) is not None:  # more than once only where the file numbered its rows otherwise
            name, times = f"{prompt}-{times}", times + 1
        return row if name == row.id else replace(row, id=name)

    def __enter__(self) -> Unique:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tables.close()


def _twice(row: Conversation, first: str) -> DataError:
    return DataError(
        f"the id comes twice; first at {first}",
        where=row.where,
        next_step="keep each row once, or give the rows ids of their own",
    )
