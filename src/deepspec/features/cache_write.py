"""A feature cache on disk: its layout, and writing it so that a kill at any moment costs one shard at most.

    DIR/shard-00000.safetensors   tokens, masks and the stored positions of a fixed range of rows
    DIR/shard-00000.json          its sidecar, written once the shard is whole: facts, rows, size, checksum
    DIR/index.json                written last: facts and every shard
    DIR/.lock                     byte s + 1 is held by the process that writes shard s, byte 0 for the index

Everything is a pure function of the rows and the facts, so a shard is the same whichever process writes it,
and ranks do not communicate: rank r writes the shards s with s % world == r.

R rows, T tokens, F feature positions, H last hidden states stored in one shard; m layers, d hidden.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.filesize import decimal
from safetensors.torch import save
from torch import Tensor

from deepspec.data.rows import pack
from deepspec.data.tokens import Encoded
from deepspec.errors import DataError, UserError
from deepspec.features.batches import Source, check_finite, online, padded
from deepspec.features.formats import TOKEN_BYTES, vector_bytes
from deepspec.features.quantise import quantise
from deepspec.files import LOCK, atomic_file, claimed, write_json, writing
from deepspec.log import note, progress
from deepspec.maths.blocks import READ_RULES, FeatureBatch, Reads
from deepspec.targets import Target

FORMAT = 1
SHARD_BYTES = 256 * 2**20
"""About the size of a shard: a kill costs one at most, and writing one holds two of them in memory."""
BATCH_TOKENS = 8192
"""Padded tokens of one forward pass of the target."""
INDEX = "index.json"


class RowCounts(NamedTuple):
    """How much of one row is stored."""

    tokens: int
    features: int
    hidden: int


@dataclass(frozen=True, eq=False)
class Plan:
    """All that decides the bytes of a cache. facts: plain data, kept in every sidecar and in the index."""

    facts: dict[str, Any]
    rows: Sequence[Encoded]
    counts: Sequence[RowCounts]
    shards: Sequence[range]

    def shard_bytes(self, shard: int) -> int:
        """Bytes of a shard's tensors."""
        return sum(row_bytes(self.counts[r], self.facts) for r in self.shards[shard])

    @property
    def tokens(self) -> int:
        return sum(counts.tokens for counts in self.counts)

    @property
    def payload(self) -> int:
        """Bytes of all tensors."""
        return sum(self.shard_bytes(s) for s in range(len(self.shards)))


def plan_cache(
    rows: Sequence[Encoded],
    target: Target,
    layers: Sequence[int],
    reads: Sequence[str],
    *,
    dtype: str = "bf16",
    about: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    batch_tokens: int = BATCH_TOKENS,
) -> Plan:
    """Decide which bytes go where, before any is computed.

    layers, reads: the union of what the recipes need. about: further facts that decide the rows (tokenizer,
    template, data); they are compared with those of a recipe that trains from the cache.
    """
    facts = {
        **about,
        "format": FORMAT,
        "target": target.spec.name,
        "target_config_hash": target.spec.config_hash,
        "hidden_size": target.spec.hidden_size,
        "layers": sorted(set(layers)),
        "reads": sorted(set(reads)),
        "dtype": dtype,
        "rows": len(rows),
        "rows_hash": rows_hash(rows),
        "shard_bytes": shard_bytes,
        "batch_tokens": batch_tokens,
    }
    counts = count_rows(rows, facts["reads"])
    return Plan(facts, rows, counts, shard_ranges([row_bytes(c, facts) for c in counts], shard_bytes))


def rows_hash(rows: Sequence[Encoded]) -> str:
    """SHA-256 (hex) of the rows in their order: ids, tokens, masks."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.id, row.ids, row.loss_mask]).encode() + b"\n")
    return digest.hexdigest()


def stored_positions(mask: Tensor, lengths: Tensor, rules: Sequence[str]) -> Reads:
    """The union of the rules over rows that are one document each."""
    return reduce(Reads.union, (READ_RULES[rule](mask, lengths, None) for rule in rules))


def count_rows(rows: Sequence[Encoded], rules: Sequence[str]) -> list[RowCounts]:
    """How much of each row is stored."""
    counts = []
    for start in range(0, len(rows), 256):
        some = rows[start : start + 256]
        _, mask, lengths = padded(some, max(len(r.ids) for r in some))
        reads = stored_positions(mask, lengths, rules)
        each = torch.stack([lengths, reads.features.sum(1), reads.hidden.sum(1)], dim=1)
        counts += [RowCounts(*numbers) for numbers in each.tolist()]
    return counts


def row_bytes(counts: RowCounts, facts: Mapping[str, Any]) -> int:
    """tokens · 5 + (features · m + hidden) · bytes of a vector."""
    vectors = counts.features * len(facts["layers"]) + counts.hidden
    return counts.tokens * TOKEN_BYTES + vectors * vector_bytes(facts["hidden_size"], facts["dtype"])


def shard_ranges(sizes: Sequence[int], shard_bytes: int) -> list[range]:
    """Rows in their order, as many to a shard as fit `shard_bytes`, at least one."""
    starts, filled = [0], 0
    for row, size in enumerate(sizes):
        if filled and filled + size > shard_bytes:
            starts.append(row)
            filled = 0
        filled += size
    return [range(a, b) for a, b in pairwise([*starts, len(sizes)])]


def batch_rows(rows: Sequence[Encoded], batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers that share a forward pass: by length, as many as fit the padded rectangle, at least one."""
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i)):
        if batch and (len(batch) + 1) * len(rows[batch[0]].ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class Written(NamedTuple):
    """complete: the shards of all processes and the index are there. shards, bytes: written by this one."""

    complete: bool
    shards: int
    bytes: int


def shard_path(out: Path, shard: int) -> Path:
    return out / f"shard-{shard:05d}.safetensors"


def write_cache(
    plan: Plan, target: Target, out: Path, *, rank: int = 0, world: int = 1, verify: bool = False
) -> Written:
    """Write the shards of this rank that are missing and, if that makes the cache whole, its index.

    verify: hash the shards that are there, and write damaged ones again. Raises DataError if `out` holds
    another cache, UserError if the disk is or will be full, NonFiniteError for features that are not finite.
    Whatever stops it, the same call continues with the shards that are missing.
    """
    out.mkdir(parents=True, exist_ok=True)
    missing = [s for s in range(len(plan.shards)) if not _whole(plan, out, s, verify=verify)]
    _check_space(plan, out, missing)
    mine = [s for s in missing if s % world == rank]
    source, written = online(target, plan.facts["layers"]), 0
    total = sum(plan.counts[r].tokens for s in mine for r in plan.shards[s])
    with writing(out):
        with progress("caching features", total) as bar:
            for shard in mine:
                with claimed(out / LOCK, shard + 1) as ours:
                    # Another process may have written it since, or may be writing it now.
                    if ours and not _whole(plan, out, shard, verify=verify):
                        written += _write_shard(plan, source, out, shard)
                bar.update(sum(plan.counts[r].tokens for r in plan.shards[shard]))
        return Written(_finish(plan, out), len(mine), written)


def _write_shard(plan: Plan, source: Source, out: Path, shard: int) -> int:
    """Write the shard, then its sidecar. Returns the bytes of the shard."""
    rows = plan.shards[shard]
    data = save(shard_tensors([plan.rows[r] for r in rows], source, plan.facts))
    with atomic_file(shard_path(out, shard)) as stream:
        stream.write(data)
    counts = [plan.counts[r] for r in rows]
    sidecar = {
        "facts": plan.facts,
        "ids": [plan.rows[r].id for r in rows],
        **{name: [getattr(c, name) for c in counts] for name in RowCounts._fields},
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_json(shard_path(out, shard).with_suffix(".json"), sidecar)
    return len(data)


def shard_tensors(rows: Sequence[Encoded], source: Source, facts: Mapping[str, Any]) -> dict[str, Tensor]:
    """A shard's tensors, its rows one after the other.

    features [m, F, d], so that some layers can be read without the others; hidden [H, d]; their scales
    `features.scale` [m, F] and `hidden.scale` [H] if the format has them; ids [T] int32, loss_mask [T] uint8.
    """
    parts: list[dict[str, Tensor]] = [{} for _ in rows]
    for picked in batch_rows(rows, facts["batch_tokens"]):
        batch = source([rows[i] for i in picked], len(rows[picked[0]].ids))
        for name, (vectors, counts) in _stored_vectors(batch, facts).items():
            stored = quantise(vectors, facts["dtype"])
            for suffix, found in (("", stored.values), (".scale", stored.scales)):
                if found is not None:
                    for i, part in zip(picked, found.cpu().split(counts), strict=True):
                        parts[i][name + suffix] = part
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    for name in tensors:
        if name.startswith("features"):
            tensors[name] = tensors[name].transpose(0, 1).contiguous()
    flat = pack(rows)
    return {**tensors, "ids": flat.ids, "loss_mask": flat.loss_mask}


def _stored_vectors(batch: FeatureBatch, facts: Mapping[str, Any]) -> dict[str, tuple[Tensor, list[int]]]:
    """features [N, m, d] and hidden [N, d] of the batch's stored positions, row after row, and how many of
    them are each row's. Raises NonFiniteError."""
    found = stored_positions(batch.loss_mask, batch.lengths, facts["reads"])
    reads = Reads(*(which.to(batch.features.device) for which in found))
    assert batch.last_hidden is not None
    layers = batch.features[reads.features].unflatten(-1, (-1, facts["hidden_size"]))
    check_finite(batch, facts["layers"], facts["target"], reads)
    return {
        "features": (layers, reads.features.sum(1).tolist()),
        "hidden": (batch.last_hidden[reads.hidden], reads.hidden.sum(1).tolist()),
    }


def _whole(plan: Plan, out: Path, shard: int, *, verify: bool = False) -> dict[str, Any] | None:
    """The sidecar, without the facts, of a shard that is there in its size (and, with `verify`, with its
    checksum). Raises DataError for a shard of another cache."""
    path = shard_path(out, shard)
    if not (file := path.with_suffix(".json")).exists():
        return None
    sidecar = json.loads(file.read_text("utf-8"))
    there = sidecar.pop("facts")
    if other := differences(there, plan.facts, sorted({*there, *plan.facts})):
        raise DataError(
            f"{out} holds another cache: {'; '.join(other)}",
            where=str(file),
            next_step="give another --out, or delete the directory to start over",
        )
    if not path.exists() or path.stat().st_size != sidecar["bytes"]:
        note(f"{path}: missing or cut off; writing it again")
        return None
    if verify and hashlib.sha256(path.read_bytes()).hexdigest() != sidecar["sha256"]:
        note(f"{path}: its checksum is wrong; writing it again")
        return None
    return sidecar


def differences(there: Mapping[str, Any], wanted: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """ "key is X there, not Y" for each fact of `keys` in which two sides differ."""
    return [
        f"{key} is {there.get(key)!r} there, not {wanted.get(key)!r}"
        for key in keys
        if there.get(key) != wanted.get(key)
    ]


def _finish(plan: Plan, out: Path) -> bool:
    """Write the index if every shard is there. Returns whether it is.

    Processes take turns here: the last of them must see what the others have written.
    """
    with claimed(out / LOCK, 0, wait=True):
        shards = []
        for shard in range(len(plan.shards)):
            if not (sidecar := _whole(plan, out, shard)):
                return False
            shards.append({"file": shard_path(out, shard).name, **sidecar})
        index = {"facts": plan.facts, "shards": shards}
        path = out / INDEX
        if not path.exists() or json.loads(path.read_text("utf-8")) != index:
            write_json(path, index)
    return True


def disk_bytes(plan: Plan, shards: Sequence[int]) -> int:
    """Bytes that shards take: their tensors, a header, and about 100 bytes per row in sidecar and index."""
    rows = sum(len(plan.shards[s]) for s in shards)
    return sum(plan.shard_bytes(s) for s in shards) + 4096 * len(shards) + 200 * rows


def _check_space(plan: Plan, out: Path, missing: Sequence[int]) -> None:
    """Print how much the cache takes. Raises UserError if the disk has less left."""
    needed, free, whole = disk_bytes(plan, missing), shutil.disk_usage(out).free, plan.payload
    note(
        f"{out}: {decimal(whole)} in {len(plan.shards)} shard(s) for {plan.tokens:,} tokens "
        f"({whole / max(plan.tokens, 1):,.0f} bytes per token, {plan.facts['dtype']}); "
        f"{decimal(needed)} to write, {decimal(free)} free"
    )
    if needed > free:
        raise UserError(
            f"the cache needs {decimal(needed)} more, and the disk has {decimal(free)} free",
            where=str(out),
            next_step="--dtype fp8 or int8 halves a bf16 cache, --limit takes fewer rows, --out another "
            "disk; or train with data.features=online, which stores nothing",
        )
