"""Conversations of any source written to one file, with unique ids, and cut to a number of rows by a seed."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from deepspec.data.conversations import Conversation, write_conversations
from deepspec.data.repeats import UniqueIds
from deepspec.data.skipping import Skipped, nothing_left
from deepspec.log import progress

BAR_ROWS = 256
"""Rows between two updates of a progress bar, which cost more than a row."""


@dataclass
class Downloaded:
    """Rows read (without bad ones), written, written with an answer, and rows that repeat a prompt."""

    read: int = 0
    rows: int = 0
    answered: int = 0
    repeats: int = 0


def download(
    rows: Iterable[Conversation],
    out: Path,
    *,
    source: str | None = None,
    limit: int = 0,
    seed: int = 0,
    drop_repeats: bool = False,
    skipped: Skipped | None = None,
) -> Downloaded:
    """Write conversations to `out`, all of them or none; `limit` > 0 cuts them (`cut`).

    `source` names where they come from, for an error.
    A repeated prompt is kept under an id of its own, or dropped (`drop_repeats`). Raises DataError for an id
    that comes twice, and if no row is left.
    """
    done = Downloaded()
    unique = UniqueIds(drop_repeats=drop_repeats)
    out.parent.mkdir(parents=True, exist_ok=True)
    with progress("reading rows", None) as bar:

        def incoming() -> Iterator[Conversation]:
            for row in rows:
                done.read += 1
                if done.read % BAR_ROWS == 0:
                    bar.update(BAR_ROWS, repeats=unique.repeats, skipped=skipped.count if skipped else 0)
                yield row

        def outgoing() -> Iterator[Conversation]:
            kept = unique.rows(incoming(), skipped)
            for row in cut(kept, limit, seed) if limit else kept:
                done.answered += row.messages[-1]["role"] == "assistant"
                yield row
            if not done.read:
                raise nothing_left(skipped, source)

        done.rows = write_conversations(out, outgoing())
    done.repeats = unique.repeats
    return done


def cut(rows: Iterable[Conversation], limit: int, seed: int) -> list[Conversation]:
    """At most `limit` rows: those with the smallest SHA-256 of (seed, id), in that order.

    If there are no more than `limit` rows, all come in their own order. Memory holds `limit` rows.
    """
    kept: list[tuple[int, int, Conversation]] = []  # a heap of (−key, −number, row), the largest key first
    full = False
    for number, row in enumerate(rows):
        full = len(kept) == limit
        key = int.from_bytes(hashlib.sha256(f"{seed}\0{row.id}".encode()).digest()[:8], "big")
        (heapq.heappushpop if full else heapq.heappush)(kept, (-key, -number, row))
    kept.sort(key=lambda entry: entry[:2] if full else entry[1], reverse=True)
    return [row for _, _, row in kept]
