"""Drafts on disk: `config.json` + `model.safetensors` in the released layout, and `deepspec.json`.

Two other layouts are read too (`drafts/layouts.py`). Reading is strict: every tensor that the config implies
must be there, in its shape, and nothing else.
Writing is atomic: beside, fsynced, renamed, so that a reader never meets half a checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from deepspec.checkpoints.layouts import as_released
from deepspec.data.tokens import tokenizer_hash
from deepspec.drafts import ALGORITHMS
from deepspec.drafts.base import NeuralDraft
from deepspec.drafts.spec import DraftSpec, SpecError, read_spec, write_config
from deepspec.errors import CheckpointError, MismatchError
from deepspec.files import aside_of, atomic_directory, write_json
from deepspec.log import note, warn
from deepspec.maths.head import Embedding, Head
from deepspec.pocket import DRAFTS, packaged
from deepspec.targets import Target, TargetSpec
from deepspec.targets.hub import fetch, may_be_hub_id, unavailable
from deepspec.targets.shards import Shape, read_tensors

PROVENANCE = "deepspec.json"
PLAIN = ("F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16")
FILES = ("*.json", "*.safetensors")
"""What is downloaded of a draft on the Hub."""
FORMS = f"a run directory such as runs/NAME, or a built-in draft ({', '.join(DRAFTS)})"
EMBEDDING, HEAD = SHARED = ("embed_tokens.weight", "lm_head.weight")
MAPS = ("d2t", "t2d")
"""Of a reduced vocabulary: offsets [K] from row i to target id i + d2t[i], and a membership mask [V]."""


def new_draft(
    spec: DraftSpec, target: Target, *, seed: int = 0, kept: Sequence[int] | None = None
) -> NeuralDraft:
    """A freshly initialised draft, bound to its target. kept: the target ids that a reduced vocabulary
    (`spec.draft_vocab_size`) keeps; the draft's head is then those rows of the target's."""
    check_fit(spec, target, "the recipe's draft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draft = ALGORITHMS[spec.algorithm].build(spec)
    head = target.head if kept is None else target.head.reduced(kept)
    draft.bind(draft_embedding(spec, target), head, target.head)
    return draft.to(target.device)


def draft_embedding(spec: DraftSpec, target: Target, weight: Tensor | None = None) -> Embedding:
    """The target's embedding with the factor its family puts on it; `weight` replaces the rows."""
    own = target.embedding
    return own if weight is None else Embedding(weight, own.scale)


def load_draft(name_or_path: str | Path, target: Target) -> NeuralDraft:
    """Load a draft and bind it to its target.

    name_or_path: a local checkpoint directory, a run directory (its best checkpoint), a Hub id, or a built-in
    name (`pocket-dspark`, …). A head or embedding of the draft's own, and a tokenizer other than the one it
    was trained with, are said. Raises CheckpointError for a broken or foreign checkpoint and MismatchError
    for a draft of another target.
    """
    path = find_checkpoint(name_or_path)
    depth = target.spec.num_layers
    spec = load_spec(path, depth)
    check_fit(spec, target, str(name_or_path))
    spec = replace(spec, num_target_layers=depth)
    tensors, copies = _read_parts(path, spec)
    head, embedding = _loans(path, spec, target, copies)
    _warn_of_other_tokenizer(path, target, str(name_or_path))
    with torch.device("meta"):
        draft = ALGORITHMS[spec.algorithm].build(spec)
    dtype = target.dtype
    draft = draft.to_empty(device="cpu").to(dtype)
    draft.load_state_dict({k: v.to(dtype) for k, v in tensors.items()})
    # Rotary frequencies are not stored, and are float32 whatever the weights are.
    draft.frequencies = ALGORITHMS[spec.algorithm].build(_tiny(spec)).frequencies
    draft = draft.to(target.device).eval().requires_grad_(False)
    draft.bind(embedding, head, target.head)
    draft.name = Path(name_or_path).name
    return draft


def _tiny(spec: DraftSpec) -> DraftSpec:
    """The same rotary facts on a draft small enough to build for nothing."""
    return replace(
        spec,
        num_layers=1,
        vocab_size=1,
        draft_vocab_size=None,
        shape=replace(spec.shape, hidden=1, intermediate=1),
    )


def find_checkpoint(name_or_path: str | Path) -> Path:
    """The directory that holds a draft's config.json: the one given, a run's best checkpoint, or where a Hub
    id's files were downloaded to. Raises CheckpointError."""
    name = str(name_or_path)
    path = Path(packaged(name))
    if not path.exists() and "/" in name and may_be_hub_id(name):
        try:
            path = fetch(name, FILES)
        except (OSError, ValueError) as error:
            what, next_step = unavailable("draft", name, error, FORMS)
            raise CheckpointError(what, next_step=next_step) from error
    best = path / "checkpoints" / "best"
    # A save that was killed between its two renames leaves the checkpoint under its aside name.
    for candidate in (path, aside_of(path), best, aside_of(best)):
        if (candidate / "config.json").is_file():
            return candidate
    if not path.exists():
        raise CheckpointError(f"no draft {name!r}", next_step=f"give a checkpoint directory, {FORMS}")
    raise CheckpointError(
        "not a draft checkpoint: no config.json here, nor under checkpoints/best",
        where=str(path),
        next_step="point at the directory that holds config.json and model.safetensors",
    )


def load_config(path: Path) -> dict[str, Any]:
    """A checkpoint's raw config.json. Raises CheckpointError."""
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"config.json cannot be read: {error}",
            where=str(path / "config.json"),
            next_step="copy or download it again",
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError("config.json is not an object", where=str(path / "config.json"))
    return config


def load_spec(path: Path, target_depth: int | None = None) -> DraftSpec:
    """What a checkpoint's config says it is, in whichever layout. target_depth: decoder layers of the target,
    which some configs count on. Raises CheckpointError."""
    try:
        return read_spec(as_released(load_config(path), target_depth))
    except SpecError as error:
        raise CheckpointError(
            str(error),
            where=str(path / "config.json"),
            next_step="the layouts that can be read are described in docs/checkpoints.md",
        ) from error


def load_provenance(path: Path) -> dict[str, Any]:
    """`deepspec.json`, or an empty dict for a checkpoint that isn't ours. Raises CheckpointError."""
    file = path / PROVENANCE
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{PROVENANCE} cannot be read: {error}",
            where=str(file),
            next_step="copy it again, or remove it: the draft then loads without saying where it came from",
        ) from error
    return found if isinstance(found, dict) else {}


def read_draft(path: Path) -> tuple[DraftSpec, dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint without its target: its spec, its own tensors, and the copies of the target's embedding
    and head (with the maps of a reduced vocabulary) that it may hold, as stored. As strict as `load_draft`.
    Raises CheckpointError."""
    spec = load_spec(path)
    return spec, *_read_parts(path, spec)


def _read_parts(path: Path, spec: DraftSpec) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the draft's own tensors, the stored copies and maps), checked against the spec."""
    tensors = read_tensors(path)
    copies = {name: tensors.pop(name) for name in (*SHARED, *MAPS) if name in tensors}
    check_names(path, spec, {name: tuple(t.shape) for name, t in (tensors | copies).items()})
    check_formats(path, {name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items()})
    broken = next((name for name, t in tensors.items() if not t.isfinite().all()), None)
    if broken is not None:
        raise CheckpointError(
            f"{broken} holds numbers that are not finite, so the draft would propose nothing of use",
            where=str(path),
            next_step="use an earlier checkpoint, or copy or download this one again",
        )
    return tensors, copies


def check_fit(spec: DraftSpec, target: Target, name: str) -> None:
    """Raise MismatchError, naming both sides, where a draft cannot belong to a target."""
    reasons = misfits(spec, target.spec, target.vocab_size)
    if reasons:
        raise MismatchError(
            f"{name} does not fit {target.spec.name}: {'; '.join(reasons)}",
            next_step="use the target that this draft was trained for, or train a draft for this one "
            "(`deepspec train`)",
        )


def misfits(spec: DraftSpec, target: TargetSpec, vocab_size: int) -> list[str]:
    """Why a draft cannot run with a target whose head has `vocab_size` rows; empty where it can."""
    depth = target.num_layers
    facts = (
        ("hidden width", spec.shape.hidden, target.hidden_size),
        ("vocabulary", spec.vocab_size, vocab_size),
        ("layer count of the target", spec.num_target_layers, depth),
    )
    reasons = [
        f"its {what} is {have}, the target's {want}" for what, have, want in facts if have not in (want, None)
    ]
    if spec.num_target_layers is None and spec.target_layer_ids[-1] >= depth - 1:
        reasons.append(f"it reads layer {spec.target_layer_ids[-1]}, and the target has {depth} layers")
    return reasons


def _warn_of_other_tokenizer(path: Path, target: Target, name: str) -> None:
    """A warning, since the output stays the target's; but such a draft guesses in another vocabulary."""
    theirs = load_provenance(path).get("tokenizer_hash")
    if theirs and target.tokenizer is not None and (ours := tokenizer_hash(target.tokenizer)) != theirs:
        warn(
            f"{name} was trained with tokenizer {theirs[:12]}, and {target.spec.name} has {ours[:12]}: "
            "few of its tokens will be accepted if the two really differ"
        )


def draft_shapes(spec: DraftSpec) -> dict[str, Shape]:
    """Name and shape of every tensor of a draft, copies of embedding and head left out; builds no weights."""
    with torch.device("meta"):
        return {
            name: tuple(t.shape) for name, t in ALGORITHMS[spec.algorithm].build(spec).state_dict().items()
        }


def copy_shapes(spec: DraftSpec) -> dict[str, Shape]:
    """What a checkpoint may store of embedding and head, and the maps of a reduced vocabulary."""
    rows, width = spec.draft_vocab_size, spec.shape.hidden
    pair: dict[str, Shape] = {EMBEDDING: (spec.vocab_size, width), HEAD: (rows or spec.vocab_size, width)}
    return pair if rows is None else pair | {"d2t": (rows,), "t2d": (spec.vocab_size,)}


def check_names(path: Path, spec: DraftSpec, stored: Mapping[str, Shape]) -> None:
    """Raise CheckpointError where the stored tensors are not exactly those that the config describes."""
    want, copies = draft_shapes(spec), copy_shapes(spec)
    reduced = spec.draft_vocab_size is not None
    # A reduced vocabulary always brings a head of its own and the map to target ids.
    required = want.keys() | ({HEAD, "d2t"} if reduced else set())
    missing, extra = sorted(required - stored.keys()), sorted(stored.keys() - want.keys() - copies.keys())
    if missing or extra:
        parts = [f"missing: {_some(missing)}"] * bool(missing) + [f"not known: {_some(extra)}"] * bool(extra)
        raise CheckpointError(
            "the tensors are not those that config.json describes: " + "; ".join(parts),
            where=str(path),
            next_step="check markov_rank, markov_head_type, enable_confidence_head, draft_vocab_size and "
            "num_hidden_layers, and that no shard is an older one",
        )
    lone = [name for name in SHARED if name in stored]
    if len(lone) == 1 and not reduced:
        raise CheckpointError(
            f"{lone[0]} is stored without its partner: embedding and head copies come as a pair "
            "or not at all",
            where=str(path),
            next_step="store both, or neither where they are the target's",
        )
    for name, shape in (want | copies).items():
        if name in stored and stored[name] != shape:
            raise CheckpointError(
                f"{name} is {list(stored[name])}, the config makes it {list(shape)}",
                where=str(path),
                next_step="check that config.json and the weights come from the same checkpoint",
            )


def check_formats(path: Path, formats: Mapping[str, str]) -> None:
    """Raise CheckpointError for weights stored otherwise than as plain floating point: cast without their
    scales, quantised ones would load and propose badly."""
    odd = next((name for name, form in formats.items() if form not in PLAIN), None)
    if odd is not None:
        raise CheckpointError(
            f"{odd} is stored as {formats[odd]}; a draft's weights are read as {', '.join(PLAIN[:4])} only",
            where=str(path),
            next_step="use the checkpoint that was not quantised",
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")


def _loans(
    path: Path, spec: DraftSpec, target: Target, copies: Mapping[str, Tensor]
) -> tuple[Head, Embedding]:
    """The head and embedding that a draft runs with. Copies that equal the target's become the target's."""
    base, own = target.head, target.embedding
    head, embedding = base, own
    if spec.draft_vocab_size is not None:
        kept = _kept(path, spec, copies)
        bias = None if base.bias is None else base.bias[kept.to(base.bias.device)]
        weight = copies[HEAD].to(base.weight)
        head = Head(weight, bias, base.scale, base.softcap, kept.to(base.weight.device))
        note(
            f"{path.name}: the draft has a head of its own, over {spec.draft_vocab_size} of the target's ids"
        )
    elif HEAD in copies and not torch.equal(weight := copies[HEAD].to(base.weight), base.weight):
        head = Head(weight, base.bias, base.scale, base.softcap)
        note(f"{path.name}: the draft has a head of its own, which differs from the target's")
    if EMBEDDING in copies and not torch.equal(rows := copies[EMBEDDING].to(own.weight), own.weight):
        embedding = draft_embedding(spec, target, rows)
        note(f"{path.name}: the draft has an embedding of its own, which differs from the target's")
    return head, embedding


def _kept(path: Path, spec: DraftSpec, copies: Mapping[str, Tensor]) -> Tensor:
    """[K] int64 target id of every row of a reduced head. Raises CheckpointError."""
    offsets, members = copies["d2t"], copies.get("t2d")
    ids = torch.arange(len(offsets)) + offsets.long()
    inside = bool(((ids >= 0) & (ids < spec.vocab_size)).all()) and len(ids.unique()) == len(ids)
    if not inside or (members is not None and ids.sort().values.tolist() != members.nonzero()[:, 0].tolist()):
        raise CheckpointError(
            "d2t does not map the draft's vocabulary to distinct ids of the target's"
            + ("" if members is None else ", those that t2d marks"),
            where=str(path),
            next_step="d2t holds offsets (target id = i + d2t[i]), not ids",
        )
    return ids


def save_draft(
    draft: NeuralDraft,
    path: Path,
    target: Target,
    provenance: dict[str, Any],
    *,
    dtype: torch.dtype | None = None,
    step_decay: float = 0.8,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint directory, atomically. The target's embedding and head are not copied into it;
    an embedding or a head of the draft's own is stored, with its partner.

    `beside` may put more files into the directory before it takes its name.
    """
    weights = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in draft.state_dict().items()}
    weights |= _own_copies(draft, target)
    config = write_config(draft.spec, target.spec.config, step_decay=step_decay)
    config["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    with atomic_directory(path) as part:
        save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
        write_json(part / "config.json", config)
        write_json(part / PROVENANCE, {**provenance, "sample_from_anchor": draft.spec.sample_from_anchor})
        if beside is not None:
            beside(part)


def _own_copies(draft: NeuralDraft, target: Target) -> dict[str, Tensor]:
    """Embedding, head and map to store; none where both are the target's."""
    head, embedding = draft.head, draft.embedding
    own_head, own_rows = (
        head.weight is not target.head.weight,
        embedding.weight is not target.embedding.weight,
    )
    if not (own_head or own_rows):
        return {}
    # Cloned: safetensors refuses two names for one memory, which tied weights are.
    copies = {HEAD: head.weight.detach().cpu().clone()}
    if own_rows or head.kept is None:
        copies[EMBEDDING] = embedding.weight.detach().cpu().clone()
    if head.kept is not None:
        kept = head.kept.cpu()
        members = torch.zeros(draft.spec.vocab_size, dtype=torch.bool)
        copies |= {"d2t": kept - torch.arange(len(kept)), "t2d": members.index_fill_(0, kept, True)}
    return copies
