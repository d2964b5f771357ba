"""The rows of a loss in chunks: which rows pass the head together, and whose teachers are computed when.

N loss rows; M teacher rows; n rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from deepspec.maths.host import sent


class Piece(NamedTuple):
    """One chunk. rows: a slice, or their places on the device; size: how many. fresh: the teacher rows to
    compute before it; None keeps those that are there. within: which of them each row learns from, as a slice
    where they follow each other, or as places on the device."""

    rows: slice | Tensor
    size: int
    fresh: slice | None
    within: slice | Tensor

    def part(self, at: slice) -> tuple[slice | Tensor, slice | Tensor]:
        """(rows, within) of some of its rows."""
        return _part(self.rows, at), _part(self.within, at)


def _part(whole: slice | Tensor, at: slice) -> slice | Tensor:
    return slice(whole.start + at.start, whole.start + at.stop) if isinstance(whole, slice) else whole[at]


def pieces(
    count: int, chunk: int, teacher_of: Tensor | None, device: torch.device, block: Tensor | None = None
) -> Iterator[Piece]:
    """`count` rows in chunks of at most `chunk`.

    teacher_of: [N] int64 on the host, each row's teacher; None: its own. Rows that share teachers come in the
    order of their teachers' chunks, and otherwise as they are. block: [N] on the host, for rows with their
    own teachers: rows that follow each other with the same number stay in one chunk; `chunk` holds any.
    """
    if teacher_of is None:
        for start, stop in pairwise(_cuts(count, chunk, block)):
            yield Piece(slice(start, stop), stop - start, slice(start, stop), slice(0, stop - start))
        return
    number = teacher_of // chunk
    order = number.argsort(stable=True)
    within = teacher_of[order] % chunk
    places, places_within = sent(order, device), sent(within, device)
    begin, teachers = 0, int(teacher_of.max()) + 1 if count else 0
    for index, end in enumerate(number.bincount().cumsum(0).tolist()):
        fresh: slice | None = slice(index * chunk, min((index + 1) * chunk, teachers))
        for start in range(begin, end, chunk):
            stop = min(start + chunk, end)
            first = int(within[start])
            straight = torch.equal(within[start:stop], torch.arange(first, first + stop - start))
            run = slice(first, first + stop - start) if straight else places_within[start:stop]
            yield Piece(places[start:stop], stop - start, fresh, run)
            fresh = None
        begin = end


def _cuts(count: int, chunk: int, block: Tensor | None) -> list[int]:
    """Where chunks begin, and where the last ends."""
    if block is None or not count:
        return [*range(0, count, chunk), count]
    cuts, last = [0], 0
    for end in [*((block.diff() != 0).nonzero()[:, 0] + 1).tolist(), count]:
        if end - cuts[-1] > chunk:
            cuts.append(last)
        last = end
    return [*cuts, count]
