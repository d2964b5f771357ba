"""Key/value slots: one growing store per layer, addressed by (slot, token position).

Key index = token position, one write position per row, so that rolling back only means using a
smaller length. R rows, Q new tokens per row (padded), H key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from deepspec.maths.host import sent

Ints = Sequence[int]
"""One whole number for each of several rows, such as their slots."""
Ragged = Sequence[Ints]
"""A list of token ids for each of several rows, of any lengths."""


class Rows(NamedTuple):
    """Where a step's rows live: `slots[r]` holds row r, whose new tokens start at `starts[r]`."""

    slots: tuple[int, ...]
    starts: tuple[int, ...]
    width: int
    """Q: new tokens per row, padding included."""

    @property
    def end(self) -> int:
        """Keys that any row can see: the longest row's length after the step, padding included."""
        return max(self.starts) + self.width

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """[R, Q] absolute token positions."""
        starts = sent(torch.tensor(self.starts), torch.device(device))
        return starts[:, None] + torch.arange(self.width, device=device)


@dataclass(eq=False)
class SlotStore:
    """Keys and values of one layer, [places, H, capacity, D], grown as needed. What a head reads in a step
    lies together: with many rows, attention takes as long as its memory's path.

    A slot gets a place in the tensors when it is first written. The slots that a step names together are
    brought to neighbouring places, so that reading them is a view: rounds that name the same slots move
    nothing and copy nothing.

    A padded token writes past its row's real length; whatever is there is overwritten before the
    row grows over it, and masks keep it unseen until then.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    places: dict[int, int] = field(default_factory=dict)
    """Where each slot is."""

    def write(self, keys: Tensor, values: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Store [R, H, Q, D] keys and values; return all the rows' ([R, H, end, D], same) from position 0."""
        here = self.reserve(rows, keys, keys.shape[1::2], values.shape[1::2])
        assert self.keys is not None and self.values is not None
        if len(set(rows.starts)) == 1:
            # Plain slices: cheaper than an index per token, and what a single row always takes.
            new = slice(rows.starts[0], rows.end)
            self.keys[here, :, new] = keys
            self.values[here, :, new] = values
        else:
            places = torch.arange(here.start, here.stop, device=keys.device)[:, None]
            positions = rows.positions(keys.device)
            self.keys[places, :, positions] = keys.transpose(1, 2)
            self.values[places, :, positions] = values.transpose(1, 2)
        return self._view(here, rows.end)

    def reserve(self, rows: Rows, like: Tensor, keys: Ints, values: Ints) -> slice:
        """Make room for a step's tokens. keys, values: their (H, D); dtype and device are those of `like`.
        Returns the places of the step's rows."""
        for slot in rows.slots:
            self.places.setdefault(slot, len(self.places))
        places, positions = (0, 0) if self.keys is None else self.keys.shape[::2]
        if len(self.places) > places or rows.end > positions:
            places = max(places, len(self.places))
            if rows.end > positions:
                positions = max(64, 2 * positions, rows.end)
            self.keys = _grown(self.keys, like.new_zeros(places, keys[0], positions, keys[1]))
            self.values = _grown(self.values, like.new_zeros(places, values[0], positions, values[1]))
        return self._together(rows.slots)

    @property
    def capacity(self) -> int:
        """Positions that each place has."""
        return 0 if self.keys is None else self.keys.shape[2]

    def extend(
        self, keys: Tensor, values: Tensor, flat: Tensor, here: slice, end: int
    ) -> tuple[Tensor, Tensor]:
        """As `write`, after `reserve`, which said `here`, for packed keys and values [T, H, D]. flat: [T*H],
        (place * H + head) * capacity + position of each."""
        assert self.keys is not None and self.values is not None
        for store, new in ((self.keys, keys), (self.values, values)):
            store.view(-1, store.shape[-1]).index_copy_(0, flat, new.reshape(-1, new.shape[-1]))
        return self._view(here, end)

    def read(self, slots: tuple[int, ...], end: int) -> tuple[Tensor, Tensor]:
        """([R, H, end, D], same) of the given slots, as views: valid until the next call."""
        return self._view(self._together(slots), end)

    @torch.inference_mode()
    def wipe(self, slot: int, start: int) -> None:
        """Zero what a slot holds from position `start` on, if it holds anything."""
        if self.keys is not None and self.values is not None and slot in self.places:
            place = self.places[slot]
            self.keys[place, :, start:] = self.values[place, :, start:] = 0.0

    def release(self) -> None:
        """Give back the memory, and forget all slots."""
        self.keys = self.values = None
        self.places.clear()

    def _view(self, here: slice, end: int) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        return self.keys[here, :, :end], self.values[here, :, :end]

    def _together(self, slots: tuple[int, ...]) -> slice:
        """The places of the slots, side by side in their order; they are swapped there if they are not."""
        first = self.places[slots[0]]
        if [self.places[slot] for slot in slots] != list(range(first, first + len(slots))):
            self._move_to_front(slots)
            first = 0
        return slice(first, first + len(slots))

    def _move_to_front(self, slots: tuple[int, ...]) -> None:
        """Swap the slots into the first places; only places whose slot changes are copied."""
        assert self.keys is not None and self.values is not None
        order = [*slots, *(s for s in sorted(self.places, key=self.places.__getitem__) if s not in slots)]
        moved = [(self.places[slot], place) for place, slot in enumerate(order) if self.places[slot] != place]
        old, new = torch.tensor(moved, device=self.keys.device).unbind(1)
        self.keys[new], self.values[new] = self.keys[old], self.values[old]
        self.places = {slot: place for place, slot in enumerate(order)}


def _grown(old: Tensor | None, new: Tensor) -> Tensor:
    if old is not None:
        new[: old.shape[0], :, : old.shape[2]] = old
    return new


def causal_rows_mask(rows: Rows, device: torch.device | str = "cpu", window: int | None = None) -> Tensor:
    """[R, 1, Q, end] bool: token i of row r sees keys j <= starts[r] + i, or the last `window` of them."""
    keys = torch.arange(rows.end, device=device)
    positions = rows.positions(device)[..., None]
    seen = keys <= positions
    if window is not None:
        seen = seen & (keys > positions - window)
    return seen[:, None]
