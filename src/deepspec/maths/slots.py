"""Key/value slots: one growing store per layer, addressed by (slot, token position).

Key index = token position, one write position per row, so that rolling back only means using a
smaller length. R rows, Q new tokens per row (padded), H key/value heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


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
        starts = torch.tensor(self.starts, device=device)
        return starts[:, None] + torch.arange(self.width, device=device)


@dataclass(eq=False)
class SlotStore:
    """Keys and values of one layer, [slots, capacity, H, D], grown as needed.

    A padded token writes past its row's real length; whatever is there is overwritten before the
    row grows over it, and masks keep it unseen until then.
    """

    keys: Tensor | None = None
    values: Tensor | None = None

    def write(self, keys: Tensor, values: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Store [R, H, Q, D] keys and values; return all the rows' ([R, H, end, D], same) from position 0."""
        self._reserve(max(rows.slots) + 1, rows.end, keys, values)
        assert self.keys is not None and self.values is not None
        if len(rows.slots) == 1:
            # One row: plain slices, and the result is a view.
            slot, start, end = rows.slots[0], rows.starts[0], rows.end
            self.keys[slot, start:end] = keys[0].transpose(0, 1)
            self.values[slot, start:end] = values[0].transpose(0, 1)
            return (
                self.keys[slot : slot + 1, :end].transpose(1, 2),
                self.values[slot : slot + 1, :end].transpose(1, 2),
            )
        slots = torch.tensor(rows.slots, device=keys.device)
        positions = rows.positions(keys.device)
        self.keys[slots[:, None], positions] = keys.transpose(1, 2)
        self.values[slots[:, None], positions] = values.transpose(1, 2)
        return self.read(rows.slots, rows.end)

    def read(self, slots: tuple[int, ...], end: int) -> tuple[Tensor, Tensor]:
        """([R, H, end, D], same) of the given slots."""
        assert self.keys is not None and self.values is not None
        first, last = slots[0], slots[-1]
        if slots == tuple(range(first, last + 1)):
            pick: slice | Tensor = slice(first, last + 1)
        else:
            pick = torch.tensor(slots, device=self.keys.device)
        return self.keys[pick, :end].transpose(1, 2), self.values[pick, :end].transpose(1, 2)

    def _reserve(self, slots: int, positions: int, keys: Tensor, values: Tensor) -> None:
        have = (0, 0) if self.keys is None else self.keys.shape[:2]
        if slots <= have[0] and positions <= have[1]:
            return
        room = (max(slots, have[0]), have[1])
        if positions > have[1]:
            room = (room[0], max(64, 2 * have[1], positions))
        self.keys = _grown(self.keys, room, keys)
        self.values = _grown(self.values, room, values)


def _grown(old: Tensor | None, room: tuple[int, int], like: Tensor) -> Tensor:
    new = like.new_zeros((*room, like.shape[1], like.shape[3]))
    if old is not None:
        new[: old.shape[0], : old.shape[1]] = old
    return new


def causal_rows_mask(rows: Rows, device: torch.device | str = "cpu", window: int | None = None) -> Tensor:
    """[R, 1, Q, end] bool: token i of row r sees keys j <= starts[r] + i, or the last `window` of them."""
    keys = torch.arange(rows.end, device=device)
    positions = rows.positions(device)[..., None]
    seen = keys <= positions
    if window is not None:
        seen = seen & (keys > positions - window)
    return seen[:, None]
