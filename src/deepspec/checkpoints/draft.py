"""Drafts bound to their target: new ones, loaded ones, and saved ones.

A checkpoint holds `config.json`, `model.safetensors` (both in the released layout) and `deepspec.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from deepspec.checkpoints import read
from deepspec.data.tokens import tokenizer_hash
from deepspec.drafts import ALGORITHMS
from deepspec.drafts.base import NeuralDraft
from deepspec.drafts.layers import inverse_frequencies
from deepspec.drafts.spec import DraftSpec, write_config
from deepspec.errors import MismatchError
from deepspec.files import atomic_directory, write_json
from deepspec.log import note, warn
from deepspec.maths.head import Embedding, Head
from deepspec.targets import Target, TargetSpec


def new_draft(
    spec: DraftSpec, target: Target, *, seed: int = 0, kept: Sequence[int] | None = None
) -> NeuralDraft:
    """A freshly initialised draft, bound to its target.

    kept: the target ids that a reduced vocabulary (`spec.draft_vocab_size`) keeps; the draft's head is then
    made of those rows of the target's. Raises MismatchError if the spec does not fit the target.
    """
    check_fit(spec, target, "the recipe's draft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        draft = ALGORITHMS[spec.algorithm].build(spec)
    head = target.head if kept is None else target.head.reduced(kept)
    draft.bind(target.embedding, head, target.head)
    return draft.to(target.device)


def load_draft(name_or_path: str | Path, target: Target, *, settled: bool = True) -> NeuralDraft:
    """Load a draft and bind it to its target.

    name_or_path: a checkpoint directory, a run directory (its best checkpoint), a Hub id, or a built-in name
    (`pocket-dspark`, …). settled: its weights will not change, so it is prepared to decode. Reports when the
    draft has its own head or embedding, and warns when the tokenizer differs from the one used in training.
    Raises CheckpointError for a broken or foreign checkpoint and MismatchError for a draft of another target.
    """
    path = read.find_checkpoint(name_or_path)
    depth = target.spec.num_layers
    spec = read.load_spec(path, depth)
    check_fit(spec, target, str(name_or_path))
    spec = replace(spec, num_target_layers=depth)
    tensors, copies = read.read_parts(path, spec)
    embedding, head = _embedding_and_head(path, spec, target, copies)
    _warn_of_other_tokenizer(path, target, str(name_or_path))
    with torch.device("meta"):
        draft = ALGORITHMS[spec.algorithm].build(spec)
    dtype = target.dtype
    draft = draft.to_empty(device="cpu").to(dtype)
    draft.load_state_dict({k: v.to(dtype) for k, v in tensors.items()})
    # Rotary frequencies are not stored, and they are float32 in a draft of any dtype.
    draft.frequencies = inverse_frequencies(spec.shape)
    draft = draft.to(target.device).eval().requires_grad_(False)
    draft.bind(embedding, head, target.head)
    draft.name = Path(name_or_path).name
    if settled:
        draft.settle()
    return draft


def check_draft(name_or_path: str | Path, target: TargetSpec) -> DraftSpec:
    """The draft's spec. Raises what `load_draft` would raise that can be known without weights, before those
    of the target are loaded."""
    spec = read.load_spec(read.find_checkpoint(name_or_path), target.num_layers)
    check_fit(spec, target, str(name_or_path))
    return spec


def check_fit(spec: DraftSpec, target: Target | TargetSpec, name: str) -> None:
    """Raise MismatchError, with the figures of both sides, if a draft cannot belong to a target."""
    known = target if isinstance(target, TargetSpec) else target.spec
    if reasons := misfits(spec, known, target.vocab_size):
        raise MismatchError(
            f"{name} does not fit {known.name}: {'; '.join(reasons)}",
            next_step="use the target that this draft was trained for, or train a draft for this one "
            "(`deepspec train`)",
        )


def misfits(spec: DraftSpec, target: TargetSpec, vocab_size: int) -> list[str]:
    """The reasons why a draft cannot run with a target whose head has `vocab_size` rows; none if it can."""
    depth = target.num_layers
    have = {"hidden width": spec.shape.hidden, "vocabulary": spec.vocab_size}
    want = {"hidden width": target.hidden_size, "vocabulary": vocab_size}
    reasons = [f"its {k} is {have[k]}, and the target's is {want[k]}" for k in have if have[k] != want[k]]
    if spec.num_target_layers not in (depth, None):
        reasons.append(f"it is for a target of {spec.num_target_layers} layers, and this one has {depth}")
    elif spec.target_layer_ids[-1] >= depth - 1:
        reasons.append(f"it reads layer {spec.target_layer_ids[-1]}, and the target has {depth} layers")
    return reasons


def _warn_of_other_tokenizer(path: Path, target: Target, name: str) -> None:
    """Warn, and do not refuse: the output stays the target's, but the draft guesses in another vocabulary."""
    theirs = read.load_provenance(path).get("tokenizer_hash")
    if theirs and target.tokenizer is not None and (ours := tokenizer_hash(target.tokenizer)) != theirs:
        warn(
            f"{name} was trained with tokenizer {theirs[:12]}, and {target.spec.name} has {ours[:12]}: "
            "if they really differ, few of the draft's tokens will be accepted"
        )


def _embedding_and_head(
    path: Path, spec: DraftSpec, target: Target, copies: Mapping[str, Tensor]
) -> tuple[Embedding, Head]:
    """The embedding and head that a draft runs with. Copies that equal the target's are replaced by it."""
    embedding, head = target.embedding, target.head
    if spec.draft_vocab_size is not None:
        kept = torch.arange(spec.draft_vocab_size) + copies[read.OFFSETS]
        bias = None if head.bias is None else head.bias[kept.to(head.bias.device)]
        weight = copies[read.HEAD].to(head.weight)
        head = Head(weight, bias, head.scale, head.softcap, kept.to(weight.device))
        note(f"{path.name}: the draft has its own head, over {len(kept)} of the target's token ids")
    elif read.HEAD in copies and not torch.equal(weight := copies[read.HEAD].to(head.weight), head.weight):
        head = Head(weight, head.bias, head.scale, head.softcap)
        note(f"{path.name}: the draft has its own head, which differs from the target's")
    if read.EMBEDDING in copies and not torch.equal(
        rows := copies[read.EMBEDDING].to(embedding.weight), embedding.weight
    ):
        embedding = Embedding(rows, embedding.scale)
        note(f"{path.name}: the draft has its own embedding, which differs from the target's")
    return embedding, head


def save_draft(
    draft: NeuralDraft,
    path: Path,
    target: Target,
    provenance: dict[str, Any],
    *,
    weights: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint directory, whole or not at all.

    The target's embedding and head are not copied into it; if the draft has one of its own, it is stored
    together with its partner. weights: its state dict, if the draft itself has only parts of it; dtype: of
    what is written. `beside` may add files to the directory before it is renamed into place.
    Raises CheckpointError for weights that are not finite.
    """
    weights = draft.state_dict() if weights is None else weights
    weights = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in weights.items()}
    weights |= _own_copies(draft, target)
    read.check_finite(path, weights)
    config = write_config(draft.spec, target.spec.config)
    config["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    facts = {**provenance, "sample_from_anchor": draft.spec.sample_from_anchor}
    with atomic_directory(path) as part:
        save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
        write_json(part / "config.json", config)
        write_json(part / read.PROVENANCE, facts)
        if beside is not None:
            beside(part)


def _own_copies(draft: NeuralDraft, target: Target) -> dict[str, Tensor]:
    """The embedding, head and maps to store; empty if both embedding and head are the target's."""
    head, embedding = draft.head, draft.embedding
    own_head = head.weight is not target.head.weight
    own_rows = embedding.weight is not target.embedding.weight
    if not (own_head or own_rows):
        return {}
    # Cloned because safetensors refuses two names for one piece of memory, which tied weights are.
    copies = {read.HEAD: head.weight.detach().cpu().clone()}
    if own_rows or head.kept is None:
        copies[read.EMBEDDING] = embedding.weight.detach().cpu().clone()
    if head.kept is not None:
        kept = head.kept.cpu()
        members = torch.zeros(draft.spec.vocab_size, dtype=torch.bool)
        offsets = kept - torch.arange(len(kept))
        copies |= {read.OFFSETS: offsets, read.MEMBERS: members.index_fill_(0, kept, True)}
    return copies
