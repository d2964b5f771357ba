"""Feature sources: where a training batch's target features come from. All give one `FeatureBatch`.

B sequences, S tokens. A source takes a step's rows and the width to pad them to; `online` runs the frozen
target in the step, once per sequence; nothing on disk.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from deepspec.data.conversations import read_conversations
from deepspec.data.rows import Rows, distinct, pack, row_lengths
from deepspec.data.tokens import Encoded, OverlongError, encode_turns, require_tokenizer
from deepspec.errors import DataError
from deepspec.features.order import batches_by_length
from deepspec.files import count_lines
from deepspec.log import progress, warn
from deepspec.maths.blocks import FeatureBatch
from deepspec.targets import Target

Source = Callable[[Sequence[Encoded], int], FeatureBatch]
"""(rows, width in tokens) -> the rows' features, right-padded to the width."""


def load_rows(
    path: str | Path,
    target: Target,
    *,
    thinking: bool,
    max_length: int,
    min_supervised: int = 2,
    limit: int | None = None,
) -> Rows:
    """Tokenise a file of answered conversations, or its first `limit`, with the target's own template; every
    row's id is unique.

    Sequences with fewer than `min_supervised` supervised tokens are left out, and counted in a warning where
    `max_length` is the reason. Raises DataError where a row is broken or nothing is left, TargetError for a
    target without a tokenizer.
    """
    require_tokenizer(target.tokenizer, target.spec.name)
    overlong: list[OverlongError] = []
    rows = pack(_sequences(path, target, thinking, max_length, min_supervised, limit, overlong))
    if not rows and overlong:
        raise overlong[0]
    if not rows:
        raise DataError(
            f"no row with at least {min_supervised} supervised tokens",
            where=str(path),
            next_step="check that the rows hold answers, and that data.max_length leaves room for them",
        )
    if overlong:
        warn(
            f"{len(overlong)} conversations are left out: their prompts alone take data.max_length, "
            f"{max_length} tokens; the first is {overlong[0].where}"
        )
    return rows


def _sequences(
    path: str | Path,
    target: Target,
    thinking: bool,
    max_length: int,
    min_supervised: int,
    limit: int | None,
    overlong: list[OverlongError],
) -> Iterator[Encoded]:
    """A file's training sequences, one at a time; what is too long goes to `overlong`."""
    assert target.tokenizer is not None
    seen: Counter[str] = Counter()
    with progress("tokenising", limit or count_lines(path)) as bar:
        for conversation in islice(read_conversations(path, require_answer=True), limit):
            try:
                found = encode_turns(target.tokenizer, conversation, thinking, max_length)
            except OverlongError as error:
                overlong.append(error)
                found = []
            for row in found:
                if sum(row.loss_mask) >= min_supervised:
                    yield replace(row, id=distinct(row.id, seen))
            bar.update(1)


def batch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row indices of every batch of an epoch: a pure function of (seed, epoch).

    Rows are shuffled and put into `batches_by_length`; the order of the batches is shuffled again.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    batches = batches_by_length(shuffled, lengths, batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def batches_from(
    rows: Sequence[Encoded], batch_size: int, seed: int, first: int
) -> Iterator[tuple[int, list[Encoded]]]:
    """(epoch, rows) of batch `first` and all after it, forever."""
    lengths = row_lengths(rows)
    per_epoch = steps_per_epoch(rows, batch_size)
    epoch, skip = divmod(first, per_epoch)
    while True:
        for picked in batch_order(lengths, batch_size, seed, epoch)[skip:]:
            yield epoch, [rows[i] for i in picked]
        epoch, skip = epoch + 1, 0


def announced(
    batches: Iterator[tuple[int, list[Encoded]]], source: Source
) -> Generator[tuple[int, list[Encoded]], None, None]:
    """The same endless batches; a source that works ahead is told of each one a step before it is read.

    Closing them closes the source.
    """
    expect, close = (getattr(source, name, None) for name in ("expect", "close"))
    try:
        coming = next(batches)
        if expect is not None:
            expect(coming[1])
        while True:
            now, coming = coming, next(batches)
            if expect is not None:
                expect(coming[1])
            yield now
    finally:
        if close is not None:
            close()


def steps_per_epoch(rows: Sequence[Encoded], batch_size: int) -> int:
    """Batches in one pass over the rows."""
    return math.ceil(len(rows) / batch_size)


def online(target: Target, layers: Sequence[int]) -> Source:
    """Features computed in the step, by the frozen target, in one forward pass over the rows."""

    def read(rows: Sequence[Encoded], width: int) -> FeatureBatch:
        ids, mask, lengths = padded(rows, width)
        output = target.read(ids, layers)
        assert output.features is not None
        return FeatureBatch(
            input_ids=ids.to(target.device),
            loss_mask=mask.to(target.device),
            features=output.features,
            last_hidden=output.last_hidden,
            lengths=lengths.to(target.device),
            row_ids=tuple(r.id for r in rows),
        )

    return read


def padded(rows: Sequence[Encoded], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [B, width] int64, loss mask [B, width] bool, lengths [B] int64); zeros past each row's end."""
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = torch.tensor(row.loss_mask, dtype=torch.bool)
    return ids, mask, torch.tensor([len(r.ids) for r in rows])
