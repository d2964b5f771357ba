"""Training sequences in flat arrays: five bytes a token. A row becomes lists only when it is asked for.

N tokens of all rows together, R rows, V vocabulary.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from deepspec.data.tokens import Encoded
from deepspec.files import atomic_file

COUNTED = 1 << 24
"""Tokens counted at a time, so that counting does not copy all of them."""


@dataclass(frozen=True, eq=False)
class Rows(Sequence[Encoded]):
    """ids [N] int32, loss_mask [N] uint8, offsets [R+1] int64, names: row i is [offsets[i], offsets[i+1])."""

    ids: Tensor
    loss_mask: Tensor
    offsets: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:  # Encoded, or a list of them for a slice
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name = self.names[index]  # raises IndexError past the end, which is how iteration stops
        start, end = self.offsets[index % len(self) :][:2].tolist()
        return Encoded(self.ids[start:end].tolist(), self.loss_mask[start:end].tolist(), name)


def pack(rows: Iterable[Encoded]) -> Rows:
    """The rows in flat arrays, read one at a time; rows that are packed already are returned unchanged."""
    if isinstance(rows, Rows):
        return rows
    ids, mask, offsets, names = array("i"), array("B"), array("q", [0]), []
    for row in rows:
        ids.extend(row.ids)
        mask.extend(row.loss_mask)
        offsets.append(len(ids))
        names.append(row.id)
    tokens, masks, starts = (torch.from_numpy(np.asarray(flat)) for flat in (ids, mask, offsets))
    return Rows(tokens, masks, starts, names)


def write_rows(path: Path, rows: Rows, about: dict[str, Any]) -> None:
    """Keep rows in a safetensors file, with plain data about them, whole or not at all."""
    names = torch.frombuffer(bytearray(json.dumps(rows.names).encode()), dtype=torch.uint8)
    tensors = {"ids": rows.ids, "loss_mask": rows.loss_mask, "offsets": rows.offsets, "names": names}
    with atomic_file(path) as stream:
        stream.write(save(tensors, metadata={"about": json.dumps(about)}))


def read_rows(path: Path) -> tuple[Rows, dict[str, Any]]:
    """What `write_rows` kept; the arrays are mapped, not read. Raises ValueError or SafetensorError if the
    file is not whole."""
    with safe_open(path, framework="pt") as opened:
        ids, mask, offsets, names = (
            opened.get_tensor(name) for name in ("ids", "loss_mask", "offsets", "names")
        )
        about = json.loads((opened.metadata() or {})["about"])
    found = Rows(ids, mask, offsets, json.loads(names.numpy().tobytes()))
    if len(found) + 1 != len(offsets) or int(offsets[-1]) != len(ids) or len(ids) != len(mask):
        raise ValueError("its arrays do not belong together")
    return found, about


def distinct(name: str, seen: Counter[str]) -> str:
    """`name`, or `name~2`, `name~3` and so on if it was seen before; the result then counts as seen."""
    seen[name] += 1
    if seen[name] == 1:
        return name
    other = f"{name}~{seen[name]}"
    if other in seen:
        return distinct(name, seen)
    seen[other] = 1
    return other


def supervised_counts(rows: Sequence[Encoded], vocab_size: int) -> Tensor:
    """How often the target produced each id: [V] int64."""
    flat, counts = pack(rows), torch.zeros(vocab_size, dtype=torch.int64)
    for ids, mask in zip(flat.ids.split(COUNTED), flat.loss_mask.split(COUNTED), strict=True):
        counts += torch.bincount(ids[mask.bool()], minlength=vocab_size)
    return counts


def frequent_ids(rows: Sequence[Encoded], size: int, always: Iterable[int], vocab_size: int) -> list[int]:
    """The `size` ids that the target produced most often in the rows, ascending, `always` included.

    Ties go to the lower id, and so do the places that are left if the rows have fewer ids.
    """
    counts = supervised_counts(rows, vocab_size)
    counts[[i for i in set(always) if i < vocab_size]] = torch.iinfo(torch.int64).max
    ranked = counts.argsort(descending=True, stable=True)
    return sorted(ranked[:size].tolist())
