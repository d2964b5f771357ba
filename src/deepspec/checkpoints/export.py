"""Drafts written so that an inference server can load them; `servers.py` decides which one can run which."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from deepspec import families
from deepspec.checkpoints import read
from deepspec.checkpoints.draft import check_fit
from deepspec.checkpoints.layouts import as_released
from deepspec.checkpoints.servers import GGUF, NATIVE, Facts, launch_commands, refuse, served_as
from deepspec.drafts.spec import EAGLE3_NORMS, DraftSpec, write_config
from deepspec.errors import UserError
from deepspec.files import atomic_directory, check_writable, write_json
from deepspec.pocket import packaged
from deepspec.targets import Target

POSITIONS = 4096
"""max_position_embeddings of a draft if neither its config nor a target says more."""
SILENT_RANK = 8
"""Rank of an all-zero sequential head. Any rank would do; this one gives GPU kernels rows of 16 bytes."""


class Exported(NamedTuple):
    """What was written. launch: the commands that serve it; notes: what was changed for the server."""

    path: Path
    to: str
    architecture: str
    proposals: int
    dtype: str
    parameters: int
    launch: list[str]
    notes: list[str]


class Ready(NamedTuple):
    """A draft in the form that a server knows. config: without its dtype; facts: of its provenance file."""

    spec: DraftSpec
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    notes: list[str]


def export_draft(
    name_or_path: str | Path,
    to: str,
    out: Path,
    *,
    target: Target | None = None,
    dtype: torch.dtype | None = None,
) -> Exported:
    """Write a draft for a server into a new directory, whole or not at all.

    to: a name in `SERVERS`, or "deepspec" for the released layout. target: the draft is checked against its
    dimensions, and stored copies of its embedding and head are left out if they are equal. dtype: the number
    format to write; None keeps the stored one. Raises UserError with every reason why the server cannot run
    the draft, CheckpointError for a broken draft, MismatchError for a target that it does not belong to.
    """
    check_free(out)
    spec, config, tensors, facts, notes = prepare(name_or_path, to, target)
    # The maps of a reduced vocabulary hold ids, which stay as they are.
    kinds = {k: dtype if dtype and v.is_floating_point() else v.dtype for k, v in tensors.items()}
    tensors = {k: v.to(kinds[k]).contiguous() for k, v in tensors.items()}
    config["dtype"] = str(tensors["fc.weight"].dtype).removeprefix("torch.")
    served = packaged(target.spec.name) if target else "TARGET"  # servers do not know the built-in names
    with atomic_directory(out) as part:
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})
        write_json(part / "config.json", config)
        write_json(part / read.PROVENANCE, facts)
    (architecture,), count = config["architectures"], sum(t.numel() for t in tensors.values())
    launch = [] if to == NATIVE else launch_commands(to, spec, served, out)
    return Exported(out, to, architecture, spec.proposals, config["dtype"], count, launch, notes)


def prepare(name_or_path: str | Path, to: str, target: Target | None) -> Ready:
    """What `export_draft` writes, in the stored number format. Raises its errors."""
    path = read.find_checkpoint(name_or_path)
    depth = None if target is None else target.spec.num_layers
    spec = read.load_spec(path, depth)
    source = as_released(read.load_config(path), depth)
    tensors, copies = read.read_parts(path, spec)
    if target is not None:
        check_fit(spec, target, str(name_or_path))
        spec = replace(spec, num_target_layers=depth)
        copies = _own(copies, target, spec)
    facts = {**read.load_provenance(path), "sample_from_anchor": spec.sample_from_anchor, "exported_to": to}
    if to == NATIVE:
        return Ready(spec, write_config(spec, source), tensors | copies, facts, [])
    server = "llamacpp" if to == GGUF else to
    needed = copies.keys() & ({read.HEAD, *read.MAPS} if spec.draft_vocab_size else set())
    refuse(server, Facts(spec, copies.keys() != needed, target))
    spec, tensors, notes = complete(server, spec, tensors)
    positions, more = _positions(source, target)
    if served_as(spec).method == "eagle3":
        # vLLM and llama.cpp read both names, older releases of SGLang only this one.
        tensors = {k.replace("layers.0.", "midlayer."): v for k, v in tensors.items()}
    notes = notes + more + (_doubts(target) if to != GGUF else [])
    return Ready(spec, server_config(spec, positions), tensors | copies, facts, notes)


def check_free(out: Path) -> None:
    """Raise UserError unless `out` can be written, and is free or holds an earlier export, which is replaced
    as a whole."""
    if out.exists() and not (out.is_dir() and "exported_to" in read.load_provenance(out)):
        raise UserError(
            "the output folder holds something else, which an export would replace",
            where=str(out),
            next_step="give --out a new folder, or the folder of an earlier export",
        )
    check_writable(out, folder=True)


def _own(copies: dict[str, Tensor], target: Target, spec: DraftSpec) -> dict[str, Tensor]:
    """The stored copies; empty if all of them equal the target's. The head of a reduced vocabulary and its
    maps stay: the target has none."""
    theirs = {read.EMBEDDING: target.embedding.weight, read.HEAD: target.head.weight}
    kept = {read.HEAD, *read.MAPS} if spec.draft_vocab_size else set()
    rest = {k: v for k, v in copies.items() if k not in kept}
    same = all(k in theirs and torch.equal(v.to(theirs[k]), theirs[k]) for k, v in rest.items())
    return {k: v for k, v in copies.items() if k in kept} if same else copies


def _positions(source: dict[str, Any], target: Target | None) -> tuple[int, list[str]]:
    """(max_position_embeddings of an exported draft, notes): the draft's own, or its target's."""
    own = families.context_length(source)
    # Drafts used to be saved with their target's length, without the factor of its rope scaling.
    if target is not None and own in (None, target.spec.config.get("max_position_embeddings")):
        own = target.spec.context_length or own
    if own is not None:
        return own, []
    return POSITIONS, [
        f"the draft does not say how many positions it has, so {POSITIONS} was written: add --target, or set "
        "max_position_embeddings"
    ]


def _doubts(target: Target | None) -> list[str]:
    """What may keep a server from running the target itself."""
    names = () if target is None else target.spec.architectures
    if target is None or any(not n.endswith("Model") or n.endswith("LMHeadModel") for n in names):
        return []
    return [
        f"config.json of {target.spec.name} names no architecture with a head for text, so that vLLM would "
        f'start a server of embeddings: set "architectures": ["{type(target.model).__name__}"] in it'
    ]


def complete(
    to: str, spec: DraftSpec, tensors: dict[str, Tensor]
) -> tuple[DraftSpec, dict[str, Tensor], list[str]]:
    """(spec, tensors, notes) with the parts that a server requires; they are zero and change no output."""
    tensors, notes = dict(tensors), []
    if served_as(spec).method == "dspark" and not spec.markov_rank:
        sizes = {"w1": spec.vocab_size, "w2": spec.draft_vocab_size or spec.vocab_size}
        new = tensors["fc.weight"].new_zeros
        tensors |= {f"markov_head.markov_{w}.weight": new(n, SILENT_RANK) for w, n in sizes.items()}
        spec = replace(spec, markov_rank=SILENT_RANK)
        notes.append("the server expects a sequential head in such a draft: an all-zero one was added")
    if to == "llamacpp" and spec.confidence and not spec.confidence_with_markov:
        weight = tensors["confidence_head.proj.weight"]
        zeros = weight.new_zeros(1, spec.markov_rank)
        tensors["confidence_head.proj.weight"] = torch.cat([weight, zeros], dim=1)
        spec = replace(spec, confidence_with_markov=True)
        notes.append(
            "llama.cpp's confidence head also reads the previous token: zero weights were added for it"
        )
    return spec, tensors, notes


def server_config(spec: DraftSpec, max_positions: int) -> dict[str, Any]:
    """A config.json, without its dtype, that all servers read in the same way. They differ in which spelling
    of a fact they read, so the config has both."""
    shape, served = spec.shape, served_as(spec)
    layers = list(spec.target_layer_ids)
    theta = shape.rope.theta
    config: dict[str, Any] = {
        "architectures": [served.architecture],
        "model_type": served.model_type,
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
        # Without it vLLM assumes 1e6 and SGLang 1e4; some servers read the first key, some the second.
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        # If it were true, SGLang would use the embedding as the head.
        "tie_word_embeddings": False,
        "num_target_layers": spec.num_target_layers,
        # null means the target's whole vocabulary and its head. SGLang's Eagle-3 fails if the key is missing.
        "draft_vocab_size": spec.draft_vocab_size,
    }
    if served.method == "eagle3":
        return config | {
            # Always written: without the first, vLLM and the speculators package assume different things.
            **{name: getattr(spec, name) for name in EAGLE3_NORMS},
            "num_aux_hidden_states": len(layers),
            # vLLM and llama.cpp number what enters a layer, SGLang numbers what leaves it.
            "eagle_aux_hidden_state_layer_ids": [k + 1 for k in layers],
            "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": layers},
        }
    block: dict[str, Any] = {
        "block_size": spec.block,
        "mask_token_id": spec.mask_token_id,
        "target_layer_ids": layers,
    }
    if served.method == "dspark":
        block |= {
            "markov_rank": spec.markov_rank,
            "markov_head_type": spec.markov_head,
            "enable_confidence_head": spec.confidence,
            "confidence_head_with_markov": spec.confidence_with_markov,
        }
    return config | {
        "layer_types": ["full_attention"] * spec.num_layers,
        # The wrong alignment gives an accepted length near 1 and no error. All servers read this key; in
        # dflash_config, vLLM refuses it if it is true.
        "sample_from_anchor": spec.sample_from_anchor,
        **block,
        "dflash_config": {**block, "causal": False},
    }
