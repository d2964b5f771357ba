"""One id, one row; and which prompts came before.

A row's default id is its prompt's hash (`prompt_id`), so a prompt that comes again is kept as `<hash>-2`,
`<hash>-3`, … (a benchmark may ask a question twice, a data set may answer one in several ways).

Memory: about 200 bytes a row (measured). Among 10 million rows two 64-bit hashes are equal with a probability
of 3 in a million; the later row would then be reported as a repeat.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from deepspec.data.conversations import Conversation, prompt_id
from deepspec.data.skipping import Skipped, refuse
from deepspec.errors import DataError

_ROW_BITS = 40


class UniqueIds:
    """Passes rows on, each under an id of its own; `repeats` counts rows whose prompt came before."""

    def __init__(self, *, drop_repeats: bool = False) -> None:
        self.repeats = 0
        self._drop = drop_repeats
        self._prompts: Counter[int] = Counter()
        self._ids: dict[int, int] = {}  # the id's hash -> index in `_files` and row, packed into one number
        self._files: list[str] = []

    def rows(self, rows: Iterable[Conversation], skipped: Skipped | None = None) -> Iterator[Conversation]:
        """`rows` in their order with unique ids.

        Raises DataError, with both places, for a row's own id that came before, or counts it in `skipped`.
        """
        for row in rows:
            prompt = prompt_id(row)
            self._prompts[int(prompt, 16)] += 1
            times = self._prompts[int(prompt, 16)]
            self.repeats += times > 1
            if times > 1 and self._drop:
                continue
            if row.id == prompt or row.id.startswith(f"{prompt}-"):
                name = row.id
                while hash(name) in self._ids:  # more than once only if the file used that number elsewhere
                    name, times = f"{prompt}-{times}", times + 1
                row = row if name == row.id else replace(row, id=name)
            elif (first := self._ids.get(hash(row.id))) is not None:
                file, number = self._files[first >> _ROW_BITS], first & ((1 << _ROW_BITS) - 1)
                refuse(
                    DataError(
                        f"the id comes twice; first at {f'{file}{number}' if number else 'an earlier row'}",
                        where=row.where,
                        next_step="keep each row once, or give the rows ids of their own",
                    ),
                    skipped,
                )
                continue
            self._ids[hash(row.id)] = self._place(row.source or "")
            yield row

    def _place(self, source: str) -> int:
        """ "file:12" as one number."""
        file = source.rstrip("0123456789")
        if not self._files or self._files[-1] != file:
            self._files.append(file)
        return len(self._files) - 1 << _ROW_BITS | int(source[len(file) :] or 0)
