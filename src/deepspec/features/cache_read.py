"""Reading a feature cache: memory-mapped, and refused if it belongs to another target, data or loss.

B sequences, S tokens, m layers, d hidden, n stored positions of a row.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache as remember
from itertools import accumulate, pairwise, starmap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepspec.data.rows import Rows
from deepspec.data.tokens import Encoded
from deepspec.errors import DataError
from deepspec.features.batches import Source, batch_of, check_finite, online, padded
from deepspec.features.cache_write import FORMAT, INDEX, RowCounts, differences, stored_positions
from deepspec.features.quantise import Stored, dequantise
from deepspec.maths.blocks import FeatureBatch, with_last_hidden
from deepspec.targets import Target

FAR = 0.2
"""Relative distance from which features count as another target's. Another order of summation gives about
0.01 in bfloat16, fp8 gives 0.03; other weights give more than 1."""


class Place(NamedTuple):
    """Where a row lies: its shard, and its tokens, feature positions and last hidden states there."""

    shard: int
    tokens: slice
    features: slice
    hidden: slice


@dataclass(frozen=True, eq=False)
class Cache:
    """A cache's index, and where each row lies. Two rows may have one id; their tokens tell them apart."""

    path: Path
    facts: Mapping[str, Any]
    shards: Sequence[Mapping[str, Any]]
    places: Sequence[tuple[str, Place]]
    tensors: Callable[[int], dict[str, Tensor]] = field(repr=False)


def open_cache(path: Path) -> Cache:
    """The cache in a directory. Checksums are left to `deepspec data cache --verify`.

    Raises DataError if there is no cache, if it is not complete, or if a shard is missing or cut off.
    """
    index = _index(path)
    facts, shards = index["facts"], index["shards"]
    for shard in shards:
        file = path / shard["file"]
        if not file.exists():
            raise _damaged(file, "it is missing")
        if (size := file.stat().st_size) != shard["bytes"]:
            raise _damaged(file, f"it has {size:,} bytes, not {shard['bytes']:,}")
    places = []
    for number, shard in enumerate(shards):
        parts = [starmap(slice, pairwise(accumulate(shard[k], initial=0))) for k in RowCounts._fields]
        places += [(name, Place(number, *row)) for name, *row in zip(shard["ids"], *parts, strict=True)]

    @remember
    def tensors(shard: int) -> dict[str, Tensor]:
        """Views of the mapped file: only what is used is read."""
        file = path / shards[shard]["file"]
        try:
            with safe_open(file, framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            raise _damaged(file, str(error)) from error

    return Cache(path, facts, shards, places, tensors)


def cached_rows(cache: Cache) -> Rows:
    """The cache's rows in their order, so that training does not have to tokenise."""
    shards = [cache.tensors(number) for number in range(len(cache.shards))]
    offsets = list(accumulate((n for shard in cache.shards for n in shard["tokens"]), initial=0))
    ids, mask = (torch.cat([shard[name] for shard in shards]) for name in ("ids", "loss_mask"))
    return Rows(ids, mask, torch.tensor(offsets), [name for name, _ in cache.places])


def _tokens(cache: Cache, place: Place) -> tuple[list[int], list[int]]:
    tensors = cache.tensors(place.shard)
    return tensors["ids"][place.tokens].tolist(), tensors["loss_mask"][place.tokens].tolist()


def cached(
    cache: Cache,
    target: Target,
    layers: Sequence[int],
    reads: Sequence[str],
    remedy: str = "",
    made_with: Mapping[str, Any] | None = None,
) -> Source:
    """The source that reads features from a cache, in the target's dtype; positions not stored are zero.

    Last hidden states are None if no rule in `reads` needs them. remedy: the command that would make a cache
    that fits. made_with: facts that the cache's rows must have. Raises DataError if this one does not fit the
    target, the layers, the loss or these facts; the source raises it for rows that are not in the cache.
    """
    if reasons := _misfits(cache, target, layers, reads, made_with or {}):
        raise _misfit(cache, reasons, remedy)
    source = _reader(cache, target, layers, with_last_hidden(reads))
    _check_numbers(cache, target, layers, source, remedy)
    return source


def _reader(cache: Cache, target: Target, layers: Sequence[int], with_hidden: bool) -> Source:
    picked = [cache.facts["layers"].index(layer) for layer in layers]
    places: dict[str, list[Place]] = defaultdict(list)
    for row_id, place in cache.places:
        places[row_id].append(place)

    def find(row: Encoded) -> Place:
        for place in places.get(row.id, []):
            if _tokens(cache, place) == (list(row.ids), list(row.loss_mask)):
                return place
        raise DataError(
            f"the cache in {cache.path} has no row {row.id!r} of these tokens: it was made from other data",
            next_step="train on the answers that the cache was made from, or make a cache from these",
        )

    def read(rows: Sequence[Encoded], width: int) -> FeatureBatch:
        tokens = _, mask, lengths = padded(rows, width)
        d, device = cache.facts["hidden_size"], target.device
        stored = stored_positions(mask, lengths, cache.facts["reads"]).hidden.to(device)
        features = torch.zeros(len(rows), width, len(layers) * d, dtype=target.dtype, device=device)
        hidden = torch.zeros(len(rows), width, d, dtype=target.dtype, device=device) if with_hidden else None
        for i, place in enumerate(map(find, rows)):
            tensors = cache.tensors(place.shard)
            part = _vectors(tensors, "features", (picked, place.features), target)
            # A row is one document, and what is stored of one document is a prefix.
            count = part.shape[1]
            features[i, :count].view(count, len(layers), d).copy_(part.transpose(0, 1))
            if hidden is not None:
                hidden[i, stored[i]] = _vectors(tensors, "hidden", place.hidden, target)
        return batch_of(rows, tokens, features, hidden)

    return read


def _vectors(tensors: Mapping[str, Tensor], name: str, at: Any, target: Target) -> Tensor:
    """A part of a stored tensor in the target's dtype. It moves to the target's device in the stored format,
    which is smaller."""
    values, scales = tensors[name][at], tensors.get(f"{name}.scale")
    scales = None if scales is None else scales[at].to(target.device)
    return dequantise(Stored(values.to(target.device), scales), target.dtype)


def _index(path: Path) -> dict[str, Any]:
    file = path / INDEX
    if not file.exists():
        there = len(list(path.glob("shard-*.json")))
        raise DataError(
            f"{path} is not complete yet: it has {there} shard(s) and no index"
            if there
            else f"there is no feature cache in {path}",
            next_step="run the same `deepspec data cache` command again, to its end"
            if there
            else "make one: deepspec data cache RECIPE --answers ANSWERS.jsonl --out DIR",
        )
    try:
        index: dict[str, Any] = json.loads(file.read_text("utf-8"))
        if (found := index["facts"]["format"]) != FORMAT:
            raise ValueError(f"it has format {found}, and this version reads format {FORMAT}")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the index of the feature cache cannot be read: {error}",
            where=str(file),
            next_step="delete it and run the same `deepspec data cache` command again; the shards are kept",
        ) from error
    return index


def _damaged(file: Path, why: str) -> DataError:
    return DataError(
        f"a shard of the feature cache is damaged: {why}",
        where=str(file),
        next_step=f"delete {file.name} and run the same `deepspec data cache` command again: only this shard "
        "is computed again",
    )


def _misfits(
    cache: Cache, target: Target, layers: Sequence[int], reads: Sequence[str], made_with: Mapping[str, Any]
) -> list[str]:
    facts, reasons = cache.facts, differences(cache.facts, made_with, made_with)
    if facts["target_config_hash"] != target.spec.config_hash:
        reasons.append(
            f"it holds features of {facts['target']} (config {facts['target_config_hash']}), not of "
            f"{target.spec.name} (config {target.spec.config_hash})"
        )
    if set(layers) - set(facts["layers"]):
        reasons.append(f"it holds layers {facts['layers']}, and the draft reads {list(layers)}")
    if set(reads) - set(facts["reads"]):
        reasons.append(
            f"it holds the positions of {', '.join(facts['reads'])}, and the loss reads {', '.join(reads)}"
        )
    return reasons


def _check_numbers(cache: Cache, target: Target, layers: Sequence[int], source: Source, remedy: str) -> None:
    """Raise DataError if the shortest stored row has other features now: the target's weights may have
    changed under the same name and config. Raise NonFiniteError if either has infinities or NaN."""
    held = [(p, name) for name, p in cache.places if p.features.start < p.features.stop]
    if not held:
        return
    place, row_id = min(held, key=lambda p: (p[0].tokens.stop - p[0].tokens.start, p[1]))
    row = Encoded(*_tokens(cache, place), row_id)
    count, d = place.features.stop - place.features.start, cache.facts["hidden_size"]
    stored, now = (read([row], len(row.ids)) for read in (source, online(target, layers)))
    check_finite(stored, layers, f"cache:{cache.path}")
    check_finite(now, layers, target.spec.name)
    pairs = zip(*(batch.features[0, :count].split(d, -1) for batch in (stored, now)), strict=True)
    for layer, (a, b) in zip(layers, pairs, strict=True):
        distance = float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-20))
        if not distance < FAR:
            why = (
                f"its features of layer {layer} in row {row_id!r} are not those that {target.spec.name} "
                f"gives now (relative distance {distance:.2f}); it was made with other weights, then "
                f"those of {cache.facts['target']}"
            )
            raise _misfit(cache, [why], remedy)


def _misfit(cache: Cache, reasons: Sequence[str], remedy: str) -> DataError:
    return DataError(
        f"the feature cache does not fit: {'; '.join(reasons)}",
        where=str(cache.path),
        next_step=remedy or "make one that fits with `deepspec data cache`",
    )
