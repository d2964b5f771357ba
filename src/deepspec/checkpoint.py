"""Drafts on disk: `config.json` + `model.safetensors` in the released layout, and `deepspec.json`.

Reading is strict: every tensor that the config implies must be there, in its shape, and nothing else.
Writing is atomic: beside, fsynced, renamed, so that a reader never meets half a checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from deepspec.drafts import ALGORITHMS, DFlashDraft, DSparkDraft, Eagle3Draft
from deepspec.drafts.base import DraftSpec, Embedding
from deepspec.drafts.spec import SpecError, read_spec, write_config
from deepspec.errors import CheckpointError, MismatchError
from deepspec.head import Head
from deepspec.pocket import packaged
from deepspec.target import Target

AnyDraft = Eagle3Draft | DFlashDraft | DSparkDraft
PROVENANCE = "deepspec.json"
SHARED = ("embed_tokens.weight", "lm_head.weight")


def new_draft(spec: DraftSpec, target: Target, *, seed: int = 0) -> AnyDraft:
    """A freshly initialised draft, bound to its target."""
    check_fit(spec, target, "the recipe's draft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draft = ALGORITHMS[spec.algorithm](spec)
    draft.bind(draft_embedding(spec, target), target.head)
    return draft.to(target.device)


def draft_embedding(spec: DraftSpec, target: Target, weight: Tensor | None = None) -> Embedding:
    """The target's embedding with the factor its family puts on it; `weight` replaces the rows."""
    own = target.embedding
    return own if weight is None else Embedding(weight, own.scale)


def load_draft(name_or_path: str | Path, target: Target) -> AnyDraft:
    """Load a draft and bind it to its target.

    name_or_path: a local checkpoint directory, a run directory (its best checkpoint), or a built-in
    name (`pocket-dspark`, …). Raises CheckpointError for a broken or foreign checkpoint and
    MismatchError for a draft of another target.
    """
    path = find_checkpoint(name_or_path)
    spec = load_spec(path)
    check_fit(spec, target, str(name_or_path))
    tensors = read_tensors(path)
    with torch.device("meta"):
        draft = ALGORITHMS[spec.algorithm](spec)
    head, embedding = _loans(path, spec, target, tensors)
    _check_names(path, dict(draft.state_dict()), tensors)
    dtype = target.dtype
    draft = draft.to_empty(device="cpu").to(dtype)
    draft.load_state_dict({k: v.to(dtype) for k, v in tensors.items()})
    # Rotary frequencies are not stored, and are float32 whatever the weights are.
    draft.frequencies = ALGORITHMS[spec.algorithm](_tiny(spec)).frequencies
    draft = draft.to(target.device).eval().requires_grad_(False)
    draft.bind(embedding, head, target.head)
    draft.name = Path(name_or_path).name
    return draft


def _tiny(spec: DraftSpec) -> DraftSpec:
    """The same rotary facts on a draft small enough to build for nothing."""
    from dataclasses import replace

    return replace(spec, num_layers=1, vocab_size=1, shape=replace(spec.shape, hidden=1, intermediate=1))


def find_checkpoint(name_or_path: str | Path) -> Path:
    """The directory that holds a draft's config.json: the one given, or a run's best checkpoint."""
    path = Path(packaged(str(name_or_path)))
    best = path / "checkpoints" / "best"
    # A save that was killed between its two renames leaves the checkpoint under its aside name.
    for candidate in (path, _aside(path), best, _aside(best)):
        if (candidate / "config.json").is_file():
            return candidate
    if not path.exists():
        raise CheckpointError(
            f"no draft {str(name_or_path)!r}",
            next_step="give a checkpoint directory, a run directory such as runs/NAME, or a built-in draft "
            "(pocket-eagle3, pocket-dflash, pocket-dspark)",
        )
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
            f"config.json cannot be read: {error}", where=str(path / "config.json")
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError("config.json is not an object", where=str(path / "config.json"))
    return config


def load_spec(path: Path) -> DraftSpec:
    """What a checkpoint's config says it is. Raises CheckpointError."""
    try:
        return read_spec(load_config(path))
    except SpecError as error:
        raise CheckpointError(
            str(error),
            where=str(path / "config.json"),
            next_step="the released layout is described in docs/checkpoints.md",
        ) from error


def load_provenance(path: Path) -> dict[str, Any]:
    """`deepspec.json`, or an empty dict for a checkpoint that isn't ours. Raises CheckpointError."""
    file = path / PROVENANCE
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{PROVENANCE} cannot be read: {error}", where=str(file)) from error
    return found if isinstance(found, dict) else {}


def read_draft(path: Path) -> tuple[DraftSpec, dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint without its target: its spec, its own tensors, and the copies of the target's embedding
    and head that it may hold, as stored. As strict as `load_draft`. Raises CheckpointError."""
    spec, tensors = load_spec(path), read_tensors(path)
    copies = {name: tensors.pop(name) for name in SHARED if name in tensors}
    if len(copies) == 1:
        raise CheckpointError(f"{next(iter(copies))} is stored without its partner", where=str(path))
    with torch.device("meta"):
        draft = ALGORITHMS[spec.algorithm](spec)
    _check_names(path, dict(draft.state_dict()), tensors)
    return spec, tensors, copies


def check_fit(spec: DraftSpec, target: Target, name: str) -> None:
    """Raise MismatchError, naming both sides, where a draft cannot belong to a target."""
    facts = (
        ("hidden width", spec.shape.hidden, target.spec.hidden_size),
        ("vocabulary", spec.vocab_size, target.vocab_size),
        ("layer count of the target", spec.num_target_layers, target.spec.num_layers),
    )
    for what, have, want in facts:
        if have != want:
            raise MismatchError(
                f"{name} does not fit {target.spec.name}: its {what} is {have}, the target's {want}",
                next_step="use the target that this draft was trained for, or train a draft for this one "
                "(`deepspec train`)",
            )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a single-file or sharded checkpoint. Raises CheckpointError."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError("the index of shards cannot be read", where=str(index)) from error
        files = [path / n for n in names]
    else:
        raise CheckpointError(
            "no model.safetensors", where=str(path), next_step="copy the weights beside config.json"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError("a shard named in the index is missing", where=str(file))
        try:
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - a safetensors handle, not a dict
                    tensors[key.removeprefix("_orig_mod.")] = opened.get_tensor(key)
        except SafetensorError as error:
            raise CheckpointError(
                f"the file is torn or not safetensors ({error})",
                where=str(file),
                next_step="copy or download it again",
            ) from error
    return tensors


def _loans(path: Path, spec: DraftSpec, target: Target, tensors: dict[str, Tensor]) -> tuple[Head, Embedding]:
    """Take the optional copies of embedding and head out of `tensors`; equal ones become the target's."""
    copies = [tensors.pop(name, None) for name in SHARED]
    if all(c is None for c in copies):
        return target.head, draft_embedding(spec, target)
    if any(c is None for c in copies):
        lone = SHARED[0] if copies[1] is None else SHARED[1]
        raise CheckpointError(
            f"{lone} is stored without its partner: embedding and head copies come as a pair or not at all",
            where=str(path),
        )
    embedded, headed = copies
    assert embedded is not None and headed is not None
    want = (target.vocab_size, spec.shape.hidden)
    for name, found in zip(SHARED, (embedded, headed), strict=True):
        if tuple(found.shape) != want:
            raise CheckpointError(f"{name} is {list(found.shape)}, expected {list(want)}", where=str(path))
    base, own = target.head, target.embedding
    same_head = torch.equal(headed.to(base.weight), base.weight)
    same_embedding = torch.equal(embedded.to(own.weight), own.weight)
    head = base if same_head else Head(headed.to(base.weight), base.bias, base.scale, base.softcap)
    return head, own if same_embedding else draft_embedding(spec, target, embedded.to(own.weight))


def _check_names(path: Path, want: dict[str, Tensor], have: dict[str, Tensor]) -> None:
    missing, extra = sorted(set(want) - set(have)), sorted(set(have) - set(want))
    if missing or extra:
        parts = [f"missing: {', '.join(missing[:5])}" + (" …" if len(missing) > 5 else "")] if missing else []
        parts += [f"not known: {', '.join(extra[:5])}" + (" …" if len(extra) > 5 else "")] if extra else []
        raise CheckpointError(
            "the tensors are not those that config.json describes: " + "; ".join(parts),
            where=str(path),
            next_step="check markov_rank, markov_head_type, enable_confidence_head and num_hidden_layers",
        )
    for name, tensor in want.items():
        if tuple(have[name].shape) != tuple(tensor.shape):
            raise CheckpointError(
                f"{name} is {list(have[name].shape)}, the config makes it {list(tensor.shape)}",
                where=str(path),
            )


def save_draft(
    draft: AnyDraft,
    path: Path,
    target: Target,
    provenance: dict[str, Any],
    *,
    dtype: torch.dtype | None = None,
    step_decay: float = 0.8,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint directory, atomically. The target's embedding and head are not copied into it.

    `beside` may put more files into the directory before it takes its name.
    """
    weights = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in draft.state_dict().items()}
    config = write_config(draft.spec, target.spec.config, step_decay=step_decay)
    config["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    with atomic_directory(path) as part:
        save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
        write_json(part / "config.json", config)
        write_json(part / PROVENANCE, {**provenance, "sample_from_anchor": draft.spec.sample_from_anchor})
        if beside is not None:
            beside(part)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A directory to fill; it takes its name, fsynced, only when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, aside = path.with_name(f".{path.name}.part"), _aside(path)
    if aside.exists() and not path.exists():
        aside.rename(path)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    yield part
    for file in part.iterdir():
        _fsync(file)
    _fsync(part)
    if path.exists():
        # A directory cannot be renamed over another: the old one steps aside first.
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        part.rename(path)
    else:
        part.rename(path)
    _fsync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(path: Path) -> Path:
    """Where a directory steps while another takes its name."""
    return path.parent / f".{path.name}.old"


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside, fsync, rename."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", "utf-8")
    _fsync(part)
    part.replace(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
