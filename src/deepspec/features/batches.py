"""Training batches, and `online`, the feature source that runs the frozen target in the step.

B sequences, S tokens. A feature source takes a step's rows and the width to pad them to, and gives a
`FeatureBatch`, whether it computes the features, reads them from a cache or fetches them from a server.
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
from deepspec.data.rows import Rows, distinct, pack
from deepspec.data.skipping import Skipped, refuse
from deepspec.data.tokens import Encoded, OverlongError, UnembeddedError, encode_turns, require_tokenizer
from deepspec.errors import DataError, NonFiniteError
from deepspec.features.order import batches_by_length
from deepspec.files import count_lines
from deepspec.log import progress, warn
from deepspec.maths.blocks import FeatureBatch, Reads
from deepspec.maths.finite import finite_layers, largest_of
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
    spare: int = 0,
    skip_bad: bool = False,
) -> Rows:
    """Tokenise a file of answered conversations, or its first `limit`, with the target's own template.

    Every row gets an id of its own. Sequences with fewer than `min_supervised` supervised tokens are left
    out; a warning counts those for which `max_length` is the reason, another one those with tokens that the
    target has no embedding for. spare: tokens of the target's context that rows leave free. skip_bad: rows
    that cannot be used are left out and reported with their reasons. Raises DataError if a row is broken or
    none is left, TargetError for a target without a tokenizer.
    """
    tokenizer = require_tokenizer(target.tokenizer, target.spec.name)
    if (fits := target.room(spare, max_length)) < max_length:
        warn(f"rows are cut at {fits} tokens and not at {max_length}: {target.spec.name} reads no more")
        max_length = fits
    left_out: list[OverlongError | UnembeddedError] = []
    skipped = Skipped() if skip_bad else None

    def encoded() -> Iterator[Encoded]:
        seen: Counter[str] = Counter()
        with progress("tokenising", limit or count_lines(path)) as bar:
            conversations = read_conversations(path, require_answer=True, skipped=skipped)
            for conversation in islice(conversations, limit):
                try:
                    found = encode_turns(
                        tokenizer, conversation, thinking, max_length, target.spec.vocab_size
                    )
                except (OverlongError, UnembeddedError) as error:
                    left_out.append(error)
                    found = []
                except DataError as error:
                    refuse(error, skipped)
                    found = []
                for row in found:
                    if sum(row.loss_mask) >= min_supervised:
                        yield replace(row, id=distinct(row.id, seen))
                bar.update(1)

    rows = pack(encoded())
    if skipped is not None:
        for line in skipped.lines():
            warn(line)
    if not rows and left_out:
        raise left_out[0]
    if not rows:
        raise DataError(
            f"no row has {min_supervised} supervised tokens or more",
            where=str(path),
            next_step="check that the rows hold answers, and that data.max_length leaves room for them",
        )
    for kind, why in (
        (OverlongError, f"their prompts alone take data.max_length, {max_length} tokens"),
        (UnembeddedError, "they hold tokens that have no row in the target's embedding"),
    ):
        if some := [error for error in left_out if isinstance(error, kind)]:
            warn(f"{len(some)} conversations are left out: {why}; the first is {some[0].where}")
    return rows


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
    lengths = pack(rows).offsets.diff().tolist()
    epoch, skip = divmod(first, math.ceil(len(rows) / batch_size))
    while True:
        for picked in batch_order(lengths, batch_size, seed, epoch)[skip:]:
            yield epoch, [rows[i] for i in picked]
        epoch, skip = epoch + 1, 0


def announced(
    batches: Iterator[tuple[int, list[Encoded]]],
    source: Source,
    share: Callable[[Sequence[Encoded]], Sequence[Encoded]] = lambda rows: rows,
) -> Generator[tuple[int, list[Encoded]], None, None]:
    """The same endless batches; a source that works ahead hears of the share that will be read of each one, a
    step before it is read.

    Closing them closes the source.
    """
    expect, close = (getattr(source, name, lambda *rows: None) for name in ("expect", "close"))
    try:
        coming = next(batches)
        expect(share(coming[1]))
        while True:
            now, coming = coming, next(batches)
            expect(share(coming[1]))
            yield now
    finally:
        close()


def online(target: Target, layers: Sequence[int]) -> Source:
    """Features computed in the step, by the frozen target, in one forward pass over the rows."""

    def read(rows: Sequence[Encoded], width: int) -> FeatureBatch:
        tokens = padded(rows, width)
        output = target.read(tokens[0], layers)
        assert output.features is not None
        return batch_of(rows, tokens, output.features, output.last_hidden)

    return read


def check_finite(batch: FeatureBatch, layers: Sequence[int], who: str, reads: Reads | None = None) -> None:
    """Raise NonFiniteError, with layer and rows, if the target's outputs in a batch are not finite: anywhere,
    since NaN reaches a loss through a mask too, or (`reads`) where they are stored.

    who: gives the features."""
    names = [f"layer {layer}" for layer in layers]
    sound = finite_layers(batch.features, len(layers))
    if reads is not None:
        sound |= ~reads.features[..., None]
    if batch.last_hidden is not None:
        hidden = largest_of(batch.last_hidden).isfinite()
        sound = torch.cat([sound, (hidden if reads is None else hidden | ~reads.hidden)[..., None]], dim=-1)
        names.append("its last hidden states")
    bad = ~sound.all(1)  # [B, layers and the last hidden states]
    if bool(bad.any()):
        first = int(bad.any(0).nonzero()[0])
        rows = [name for name, wrong in zip(batch.row_ids, bad[:, first].tolist(), strict=True) if wrong]
        raise NonFiniteError(who, names[first], rows)


def batch_of(
    rows: Sequence[Encoded], tokens: Sequence[Tensor], features: Tensor, last_hidden: Tensor | None
) -> FeatureBatch:
    """The batch of rows that are `padded` to `tokens`, which stay on the host."""
    ids, mask, lengths = tokens
    return FeatureBatch(ids, mask, features, last_hidden, lengths, tuple(row.id for row in rows))


def padded(rows: Sequence[Encoded], width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [B, width] int64, loss mask [B, width] bool, lengths [B] int64); zeros past each row's end."""
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = torch.tensor(row.loss_mask, dtype=torch.bool)
    return ids, mask, torch.tensor([len(r.ids) for r in rows])
