"""The rows of a loss in chunks: which rows pass the head together, and whose teachers are computed when.

N loss rows; M teacher rows; n rows of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from deepspec.maths.host import sent


class _Places:
    """Places [n], known on the host. A range of them is a slice if they follow each other: what is there is
    then read without a copy."""

    def __init__(self, places: Tensor, device: torch.device) -> None:
        jumps = (places.diff() != 1).nonzero()[:, 0] + 1
        cuts = torch.cat([jumps.new_zeros(1), jumps, jumps.new_tensor([len(places)])])
        self.host, self.sent = places.tolist(), sent(places, device)
        self.ends = cuts[1:].repeat_interleave(cuts.diff()).tolist()
        """Where the run of each one ends."""

    def part(self, at: slice) -> slice | Tensor:
        if at.stop > self.ends[at.start]:
            return self.sent[at]
        return slice(self.host[at.start], self.host[at.start] + at.stop - at.start)


@dataclass(frozen=True)
class Piece:
    """One chunk of `size` rows. fresh: the teacher rows to compute before it; None keeps those that are
    there."""

    size: int
    fresh: slice | None
    start: int
    places: tuple[_Places, _Places] | None = None
    """Of all rows in the order of their chunks, which `start` counts in, and of their teachers in the chunk.
    None: rows come as they are, each with a teacher of its own."""

    @property
    def rows(self) -> slice | Tensor:
        """A slice, or places on the device."""
        return self.part(slice(0, self.size))[0]

    def part(self, at: slice) -> tuple[slice | Tensor, slice | Tensor]:
        """(rows, the chunk's teachers they learn from) of some of its rows, at least one, each as a slice or
        as places on the device."""
        span = slice(self.start + at.start, self.start + at.stop)
        if self.places is None:
            return span, at
        rows, teachers = self.places
        return rows.part(span), teachers.part(span)


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
            yield Piece(stop - start, slice(start, stop), start)
        return
    number = teacher_of // chunk
    order = number.argsort(stable=True)
    places = _Places(order, device), _Places(teacher_of[order] % chunk, device)
    begin, teachers = 0, int(teacher_of.max()) + 1 if count else 0
    for index, end in enumerate(number.bincount().cumsum(0).tolist()):
        fresh: slice | None = slice(index * chunk, min((index + 1) * chunk, teachers))
        for start in range(begin, end, chunk):
            yield Piece(min(chunk, end - start), fresh, start, places)
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
