"""Rows of CSV text, and where reading continues after a row with broken quotes.

Where such a row ends cannot be known for certain. So whatever looks like the rest of it is lost with it, and
the report says which lines these are: a row made from the tail of another would be trained on.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator
from typing import Any

from deepspec.data.skipping import Skipped, refuse
from deepspec.errors import DataError

LOOK_AHEAD = 500
"""Lines after a broken row in which the end of its last cell is looked for."""
SURELY_ROWS = 3
"""So many lines, all with the delimiters of a row, are rows: the text of a cell does not look like that."""
_STEP = "put cells that hold quotes, delimiters or line ends in quotes, and double the quotes inside"


def csv_rows(
    lines: Iterator[tuple[str, str]], delimiter: str, skipped: Skipped | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, cells by column name) of each row of `lines`, which are ("file:line", text).

    An empty cell becomes None. A row may span lines; its place is its first line. Raises DataError for a bad
    row, or counts it in `skipped`; bad column names are always raised.
    """
    table = _Table(lines, delimiter)
    heads: list[str] = []
    while (cells := table.next_row()) is not None:
        if table.trouble:
            error = DataError(f"malformed CSV: {table.trouble}", where=table.where, next_step=_STEP)
            refuse(error, skipped if heads else None)
        elif not heads:
            if twice := {head for head in cells if cells.count(head) > 1}:
                what = f"two columns are named {min(twice)!r}"
                raise DataError(what, where=table.where, next_step="rename one")
            heads = cells
            table.width = len(heads)
        elif cells and len(cells) != len(heads):  # a blank line has no cells
            what = f"{len(cells)} cells, but the first row names {len(heads)} columns{table.leave_row()}"
            refuse(DataError(what, where=table.where), skipped)
        elif cells:
            yield table.where, {head: cell or None for head, cell in zip(heads, cells, strict=True)}


class _Table:
    """The rows of CSV text, one at a time. `where` and `trouble` are the latest row's place and fault."""

    def __init__(self, lines: Iterator[tuple[str, str]], delimiter: str) -> None:
        self.where = self.trouble = ""
        self.width = 0
        """Cells of a whole row."""
        self._lines, self._delimiter = lines, delimiter
        self._ahead: deque[tuple[str, str]] = deque()  # lines that were looked at, but not read
        self._taken: list[tuple[str, str]] = []  # lines of the latest row
        self._reader = self._read()
        start, end = rf"(?:^|{re.escape(delimiter)})", rf"(?:{re.escape(delimiter)}|\r?\n?\Z)"
        # A quote after a delimiter opens a cell. One before a delimiter closes it, unless it is escaped.
        self._quote = re.compile(rf'{start}"(?!{end})|(?<![\\"])(?:"")*(?P<closing>")(?={end})')

    def next_row(self) -> list[str] | None:
        """The cells of the next row, none of a malformed one; None at the end."""
        self._taken.clear()
        self.trouble = ""
        try:
            cells = next(self._reader, None)
        except csv.Error as error:
            cells, self.trouble = [], str(error).partition(" - ")[0]
            if self._ended and self._rows_follow():
                self._ahead.extend(self._taken[1:])
                del self._taken[1:]
                self._reader = self._read()
        self.where = self._taken[0][0] if self._taken else ""
        self.trouble += self.leave_row() if self.trouble else ""
        return cells

    def _rows_follow(self) -> bool:
        """Whether what follows a quote that nothing closes, up to the end of the file, is plainly rows.

        Otherwise the file may have been cut inside a long cell.
        """
        later = [text for _, text in self._taken[1:]]
        cells = {text.count(self._delimiter) + 1 for text in later}
        return len(later) >= SURELY_ROWS and self.width > 1 and cells == {self.width}

    def leave_row(self) -> str:
        """Leave out what still belongs to the bad row that was read. Returns its lines in words, if several.

        The next quote tells: if it closes a cell that no quote opened, the row has reached this far.
        """
        first = last = self.where
        while any('"' in text for _, text in self._taken):
            last = self._taken[-1][0]
            looked: list[tuple[str, str]] = []
            quote = None
            while quote is None and len(looked) < LOOK_AHEAD and (line := self._next_line()):
                looked.append(line)
                quote = self._quote.search(line[1])
            if quote is None or quote["closing"] is None:
                self._ahead.extendleft(reversed(looked))
                break
            last, text = looked[-1]
            self._taken.clear()
            self._ahead.appendleft((last, '"' + text[quote.start("closing") :]))  # as a row of its own
            try:
                next(self._reader)
            except csv.Error:
                continue
            last = self._taken[-1][0]
            break
        numbers = [place.rpartition(":")[2] for place in (first, last)]
        return f" (lines {numbers[0]} to {numbers[1]})" if first != last else ""

    def _next_line(self) -> tuple[str, str] | None:
        return self._ahead.popleft() if self._ahead else next(self._lines, None)

    def _read(self) -> Iterator[list[str]]:
        self._ended = False
        return csv.reader(iter(self._take, None), delimiter=self._delimiter, strict=True)

    def _take(self) -> str | None:
        """The next line, for the reader."""
        if (line := self._next_line()) is None:
            self._ended = True
            return None
        self._taken.append(line)
        return line[1]
