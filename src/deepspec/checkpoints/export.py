"""Drafts in the form that inference servers load, or a refusal that names the way out.

`servers.py` decides what a server can run and how it names a draft; this file writes the checkpoint that the
server's loader reads.

m captured layers, d hidden width, V vocabulary, r Markov rank, N proposals per round.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from deepspec.checkpoints.draft import (
    EMBEDDING,
    HEAD,
    PROVENANCE,
    check_fit,
    find_checkpoint,
    load_config,
    load_provenance,
    read_draft,
)
from deepspec.checkpoints.servers import NATIVE, Facts, launch_commands, refuse, served_as
from deepspec.drafts.spec import DraftSpec, write_config
from deepspec.errors import UserError
from deepspec.files import atomic_directory, write_json
from deepspec.pocket import packaged
from deepspec.targets import Target

SILENT_RANK = 8
"""Rank of an all-zero sequential head: any would do; GPU kernels like rows of 16 bytes."""


class Exported(NamedTuple):
    """What was written. launch: the commands that serve it; notes: what was changed on the way."""

    path: Path
    to: str
    architecture: str
    proposals: int
    dtype: str
    parameters: int
    launch: list[str]
    notes: list[str]


def export_draft(
    name_or_path: str | Path,
    to: str,
    out: Path,
    *,
    target: Target | None = None,
    dtype: torch.dtype | None = None,
) -> Exported:
    """Write a draft for a server into a directory of its own, whole or not at all.

    to: a name in `SERVERS`, or "deepspec" for the released layout. target: compared in its dimensions,
    embedding and head; stored copies of the last two are left out where they are equal. dtype: None keeps the
    stored one. Raises UserError with every reason why the server cannot run the draft, CheckpointError for a
    broken one, MismatchError for a target that it does not belong to.
    """
    _check_free(out)
    path = find_checkpoint(name_or_path)
    source = load_config(path)
    spec, tensors, copies = read_draft(path)
    if target is not None:
        check_fit(spec, target, str(name_or_path))
        copies = _own(copies, target)
    notes: list[str] = []
    if to == NATIVE:
        config = write_config(spec, source, step_decay=source.get("step_loss_decay", 0.8))
    else:
        refuse(to, Facts(spec, bool(copies), target))
        spec, tensors, notes = complete(to, spec, tensors)
        config = server_config(spec, int(source.get("max_position_embeddings") or 4096))
        if served_as(spec).method == "eagle3":
            # vLLM and llama.cpp read both names, SGLang's older releases this one alone.
            tensors = {k.replace("layers.0.", "midlayer."): v for k, v in tensors.items()}
    tensors = {k: _cast(v, dtype) for k, v in (tensors | copies).items()}
    config["dtype"] = str(tensors["fc.weight"].dtype).removeprefix("torch.")
    facts = {**load_provenance(path), "sample_from_anchor": spec.sample_from_anchor, "exported_to": to}
    served = packaged(target.spec.name) if target else "TARGET"  # servers do not know our built-in names
    with atomic_directory(out) as part:
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        write_json(part / "config.json", config)
        write_json(part / PROVENANCE, facts)
    return Exported(
        out,
        to,
        config["architectures"][0],
        spec.proposals,
        config["dtype"],
        sum(t.numel() for t in tensors.values()),
        [] if to == NATIVE else launch_commands(to, spec, served, out),
        notes,
    )


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """In another dtype, where it holds weights and not ids."""
    return tensor.to(dtype if dtype and tensor.is_floating_point() else tensor.dtype).contiguous()


def _check_free(out: Path) -> None:
    """The directory is replaced as a whole, so it may hold nothing but an earlier export."""
    if out.exists() and not (out.is_dir() and "exported_to" in load_provenance(out)):
        raise UserError(
            "there is something else already, which an export would replace",
            where=str(out),
            next_step="give --out a new folder, or that of an earlier export",
        )


def _own(copies: dict[str, Tensor], target: Target) -> dict[str, Tensor]:
    """The stored copies, or nothing where both are the target's."""
    theirs = {EMBEDDING: target.embedding.weight, HEAD: target.head.weight}
    same = all(
        name in theirs and torch.equal(copy.to(theirs[name]), theirs[name]) for name, copy in copies.items()
    )
    return {} if same else copies


def complete(
    to: str, spec: DraftSpec, tensors: dict[str, Tensor]
) -> tuple[DraftSpec, dict[str, Tensor], list[str]]:
    """Add the parts that a server insists on, all zero, so that no output changes: (spec, tensors, notes)."""
    tensors, notes = dict(tensors), []
    if served_as(spec).method == "dspark" and not spec.markov_rank:
        zeros = tensors["fc.weight"].new_zeros(spec.vocab_size, SILENT_RANK)
        tensors |= {f"markov_head.markov_{w}.weight": zeros.clone() for w in ("w1", "w2")}
        spec = replace(spec, markov_rank=SILENT_RANK)
        notes.append("it samples from its anchor, as DSpark does: an all-zero sequential head makes it one")
    if to == "llamacpp" and spec.confidence and not spec.confidence_with_markov:
        weight = tensors["confidence_head.proj.weight"]
        tensors["confidence_head.proj.weight"] = torch.cat(
            [weight, weight.new_zeros(1, spec.markov_rank)], dim=1
        )
        spec = replace(spec, confidence_with_markov=True)
        notes.append("its confidence head was widened by zeros: llama.cpp's also reads the previous token")
    return spec, tensors, notes


def server_config(spec: DraftSpec, max_positions: int) -> dict[str, Any]:
    """The config.json that all servers read alike (tools differ in which spelling they look at, so both of
    every pair are there); without its dtype."""
    shape, form = spec.shape, served_as(spec)
    layers = list(spec.target_layer_ids)
    theta = shape.rope.theta
    config: dict[str, Any] = {
        "architectures": [form.architecture],
        "model_type": form.model_type,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": shape.activation,
        "rms_norm_eps": shape.eps,
        "attention_bias": shape.attention_bias,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": max_positions,
        # Absent, vLLM takes 1e6 and SGLang 1e4; some read the one key, some the other.
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        # True would make SGLang take the embedding for the head.
        "tie_word_embeddings": False,
        "num_target_layers": spec.num_target_layers,
    }
    if form.method == "eagle3":
        return config | {
            # null: the target's whole vocabulary and its head. SGLang fails where the key is missing.
            "draft_vocab_size": spec.draft_vocab_size,
            "norm_before_residual": False,
            "num_aux_hidden_states": len(layers),
            # vLLM and llama.cpp count the streams between layers, SGLang the layers.
            "eagle_aux_hidden_state_layer_ids": [k + 1 for k in layers],
            "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": layers},
        }
    block: dict[str, Any] = {
        "block_size": spec.block,
        "mask_token_id": spec.mask_token_id,
        "target_layer_ids": layers,
        # The wrong alignment gives an accepted length near 1 and no error.
        "sample_from_anchor": spec.sample_from_anchor,
    }
    if form.method == "dspark":
        block |= {
            "markov_rank": spec.markov_rank,
            "markov_head_type": spec.markov_head,
            "enable_confidence_head": spec.confidence,
            "confidence_head_with_markov": spec.confidence_with_markov,
        }
    return config | {
        "layer_types": ["full_attention"] * spec.num_layers,
        **block,
        "dflash_config": {**block, "causal": False},
    }
