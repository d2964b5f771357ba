"""A draft checkpoint as it is on disk: which directory holds it, what its config says, and its tensors.

Reading is strict: every tensor that the config implies must be there in its shape, and nothing else may be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepspec.checkpoints.layouts import as_released
from deepspec.drafts import ALGORITHMS
from deepspec.drafts.spec import DraftSpec, SpecError, read_spec
from deepspec.errors import CheckpointError
from deepspec.files import aside_of
from deepspec.pocket import DRAFTS, packaged
from deepspec.targets.hub import fetch, may_be_hub_id, unavailable
from deepspec.targets.shards import Shape, read_tensors

PROVENANCE = "deepspec.json"
PLAIN = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")
"""Number formats that a draft's weights may have, as safetensors and as torch spell them."""
FILES = ("*.json", "*.safetensors")
"""The files of a draft on the Hub that are downloaded."""
CHOICES = f"a run directory such as runs/NAME, or a built-in draft ({', '.join(DRAFTS)})"
"""What may be given for a draft, apart from a checkpoint directory."""
EMBEDDING, HEAD = SHARED = ("embed_tokens.weight", "lm_head.weight")
OFFSETS, MEMBERS = MAPS = ("d2t", "t2d")
"""Tensors of a reduced vocabulary: offsets [K] (row i is target id i + d2t[i]) and a membership mask [V]."""


def find_checkpoint(name_or_path: str | Path) -> Path:
    """The directory that holds a draft's config.json: the one given, a run's best checkpoint, or the folder
    that a Hub id was downloaded to. Raises CheckpointError."""
    name = str(name_or_path)
    path = Path(packaged(name))
    if not path.exists() and "/" in name and may_be_hub_id(name):
        try:
            path = fetch(name, FILES)
        except (OSError, ValueError) as error:
            what, next_step = unavailable("draft", name, error, CHOICES)
            raise CheckpointError(what, next_step=next_step) from error
    best = path / "checkpoints" / "best"
    # A save that was killed between its two renames leaves the checkpoint under its aside name.
    for candidate in (path, aside_of(path), best, aside_of(best)):
        if (candidate / "config.json").is_file():
            return candidate
    if not path.exists():
        raise CheckpointError(
            f"no draft named {name!r} was found", next_step=f"give a checkpoint directory, {CHOICES}"
        )
    raise CheckpointError(
        "this is not a draft checkpoint: there is no config.json here or in checkpoints/best",
        where=str(path),
        next_step="give the directory that holds config.json and model.safetensors; a run has one after its "
        "first held-out evaluation",
    )


def load_config(path: Path) -> dict[str, Any]:
    """A checkpoint's raw config.json. Raises CheckpointError."""
    return _read_object(path / "config.json", "copy or download it again")


def load_spec(path: Path, target_depth: int | None = None) -> DraftSpec:
    """The draft that a checkpoint's config describes, in any layout that can be read.

    target_depth: the number of the target's decoder layers, which some configs depend on. Raises
    CheckpointError.
    """
    config = load_config(path)
    try:
        return read_spec(as_released(config, target_depth))
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        known = isinstance(error, SpecError)
        raise CheckpointError(
            str(error) if known else f"a value in the config is not of its kind ({error})",
            where=str(path / "config.json"),
            next_step="docs/checkpoints.md describes the layouts that can be read",
        ) from error


def load_provenance(path: Path) -> dict[str, Any]:
    """`deepspec.json`, or an empty dict if the checkpoint does not have one. Raises CheckpointError."""
    file = path / PROVENANCE
    next_step = "copy it again, or remove it: the draft loads without it, and only its origin is unknown"
    return _read_object(file, next_step) if file.is_file() else {}


def _read_object(file: Path, next_step: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it does not hold a JSON object")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file.name} cannot be read: {error}", where=str(file), next_step=next_step
        ) from error
    return found


def read_parts(path: Path, spec: DraftSpec) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the draft's own tensors, the stored copies of the target's embedding and head with the maps of a
    reduced vocabulary), checked against the spec: weights as stored, maps as int64 and bool. Raises
    CheckpointError."""
    stored = read_tensors(path)
    check_names(path, spec, {name: tuple(t.shape) for name, t in stored.items()})
    check_formats(path, spec, {name: str(t.dtype).removeprefix("torch.") for name, t in stored.items()})
    maps = _maps(path, spec, {name: stored.pop(name) for name in MAPS if name in stored})
    check_finite(path, stored)
    copies = {name: stored.pop(name) for name in SHARED if name in stored}
    return stored, copies | maps


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if a draft's weights hold infinities or NaN."""
    broken = next((name for name, t in tensors.items() if not t.isfinite().all()), None)
    if broken is not None:
        raise CheckpointError(
            f"{broken} holds numbers that are not finite, so the draft could not propose anything useful",
            where=str(path),
            next_step="use an earlier checkpoint, or copy or download this one again",
        )


def _maps(path: Path, spec: DraftSpec, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The maps of a reduced vocabulary; none for a whole one, whose maps may only be the identity. Raises
    CheckpointError for maps that do not lead to distinct ids of the target."""
    whole = spec.draft_vocab_size is None
    rows = torch.arange(spec.draft_vocab_size or spec.vocab_size)
    ids = rows + stored[OFFSETS].long() if OFFSETS in stored else rows
    fine = bool(((ids >= 0) & (ids < spec.vocab_size)).all()) and len(ids.unique()) == len(ids)
    members = stored[MEMBERS].bool() if MEMBERS in stored else None
    if members is not None:
        fine = fine and ids.sort().values.tolist() == members.nonzero()[:, 0].tolist()
    if not fine or (whole and not torch.equal(ids, rows)):
        raise CheckpointError(
            "d2t does not map the draft's vocabulary to distinct ids of the target"
            + ("" if members is None else ", or not to the ones that t2d marks")
            + (": the vocabulary is not reduced, so each id must map to itself" if whole else ""),
            where=str(path),
            next_step="store offsets in d2t (target id = i + d2t[i]), not ids",
        )
    return {} if whole else {OFFSETS: ids - rows} | ({} if members is None else {MEMBERS: members})


def draft_shapes(spec: DraftSpec) -> dict[str, Shape]:
    """Name and shape of every tensor that belongs to a draft itself; no weights are made."""
    with torch.device("meta"):
        tensors = ALGORITHMS[spec.algorithm].build(spec).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def copy_shapes(spec: DraftSpec) -> dict[str, Shape]:
    """Name and shape of the copies of embedding and head that a checkpoint may store, and of the maps of a
    reduced vocabulary."""
    rows, width = spec.draft_vocab_size or spec.vocab_size, spec.shape.hidden
    pair: dict[str, Shape] = {EMBEDDING: (spec.vocab_size, width), HEAD: (rows, width)}
    return pair if spec.draft_vocab_size is None else pair | _map_shapes(spec)


def _map_shapes(spec: DraftSpec) -> dict[str, Shape]:
    return {OFFSETS: (spec.draft_vocab_size or spec.vocab_size,), MEMBERS: (spec.vocab_size,)}


def check_names(path: Path, spec: DraftSpec, stored: Mapping[str, Shape]) -> None:
    """Raise CheckpointError if the stored tensors are not exactly the ones that the config describes."""
    # Some trainers also store the maps of a whole vocabulary.
    want, copies = draft_shapes(spec), copy_shapes(spec) | _map_shapes(spec)
    reduced = spec.draft_vocab_size is not None
    # A draft with a reduced vocabulary always has its own head, and the map to target ids.
    required = want.keys() | ({HEAD, OFFSETS} if reduced else set())
    missing, extra = sorted(required - stored.keys()), sorted(stored.keys() - want.keys() - copies.keys())
    if missing or extra:
        parts = [f"missing: {_some(missing)}"] * bool(missing) + [f"not known: {_some(extra)}"] * bool(extra)
        raise CheckpointError(
            f"the stored tensors do not match config.json ({'; '.join(parts)})",
            where=str(path),
            next_step="check markov_rank, markov_head_type, enable_confidence_head, draft_vocab_size and "
            "num_hidden_layers in config.json, and that no shard is an older one",
        )
    lone = [name for name in SHARED if name in stored]
    if len(lone) == 1 and not reduced:
        raise CheckpointError(
            f"{lone[0]} is stored without its partner: a checkpoint holds copies of both the embedding and "
            "the head, or of neither",
            where=str(path),
            next_step="store both, or neither if they are the target's",
        )
    for name, shape in (want | copies).items():
        if name in stored and stored[name] != shape:
            raise CheckpointError(
                f"{name} has the shape {list(stored[name])}, but config.json implies {list(shape)}",
                where=str(path),
                next_step="check that config.json and the weights come from the same checkpoint",
            )


def check_formats(path: Path, spec: DraftSpec, formats: Mapping[str, str]) -> None:
    """Raise CheckpointError unless all weights are plain floating point and all maps whole numbers.

    Quantised weights that are cast without their scales would load, and the draft would propose badly. Maps
    that were cast along with the weights are rounded, so that most ids are others.
    """
    for name, kind in formats.items():
        if name not in MAPS and kind not in PLAIN:
            raise CheckpointError(
                f"{name} is stored as {kind}, but draft weights must be one of {', '.join(PLAIN[:4])}",
                where=str(path),
                next_step="use the checkpoint that was not quantised",
            )
        if name in MAPS and _largest(kind) < (spec.vocab_size - 1 if name == OFFSETS else 1):
            raise CheckpointError(
                f"{name} is stored as {kind}, and it must be of whole numbers that reach every id of a "
                f"vocabulary of {spec.vocab_size}",
                where=str(path),
                next_step="use the checkpoint as it was before it was cast: d2t as int64, t2d as bool",
            )


def _largest(kind: str) -> int:
    """The largest number of a format of whole numbers, in either spelling (I64, int64); 0 of any other."""
    found = re.fullmatch(r"(u?)(?:int|i)?(\d+)", kind.lower())
    if found is None:
        return int(kind.lower() == "bool")
    bits = int(found[2])
    return int(2 ** (bits if found[1] else bits - 1) - 1)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
