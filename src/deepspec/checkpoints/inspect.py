"""What a draft checkpoint is, and whether it fits a target. The answers come from `config.json`,
`deepspec.json` and the headers of the weight files; no weights are loaded, not even the target's.

V vocabulary, K rows of the draft's own head, d hidden width.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

from deepspec.checkpoints import read
from deepspec.checkpoints.draft import misfits
from deepspec.checkpoints.layouts import layout_of
from deepspec.data.template import template_hash
from deepspec.data.tokens import tokenizer_hash
from deepspec.drafts import ALGORITHMS
from deepspec.drafts.spec import DraftSpec
from deepspec.features.formats import NUMBER_BYTES
from deepspec.targets import TargetSpec
from deepspec.targets.shards import read_headers


def inspect_draft(name_or_path: str | Path, target: TargetSpec | None = None) -> dict[str, Any]:
    """Facts of a draft as plain JSON data. A fact is None if the checkpoint does not contain it.

    `parameters` counts the draft's own; embedding and head are the target's unless the draft stores others,
    which only loading it can tell. `gb_added` (10⁹ bytes) and `kv_bytes_per_token` assume the target's number
    format, or the stored one if no target is given. `fits` is None without a target; `reasons` lists why the
    draft does not fit, `doubts` the differences that do not keep it from running. Raises CheckpointError.
    """
    path = read.find_checkpoint(name_or_path)
    spec = read.load_spec(path, None if target is None else target.num_layers)
    stored = read_headers(path)
    read.check_names(path, spec, {name: shape for name, (shape, _) in stored.items()})
    formats = {name: kind for name, (_, kind) in stored.items()}
    read.check_formats(path, spec, formats)
    stored_as = sorted({formats[name] for name in formats.keys() - {*read.SHARED, *read.MAPS}})
    facts = read.load_provenance(path)
    dtype = (target and (target.config.get("dtype") or target.config.get("torch_dtype"))) or stored_as[0]
    size = NUMBER_BYTES.get(str(dtype), NUMBER_BYTES.get(stored_as[0], 4))
    own, copies = parameters(spec)
    aligned = "anchor-first" if spec.sample_from_anchor else "fill-in"
    seen = "the previous token" if spec.confidence_with_markov else "only the hidden row"
    added = own + (math.prod(read.copy_shapes(spec)[read.SHARED[1]]) if spec.draft_vocab_size else 0)
    found = {
        "draft": str(path),
        "layout": layout_of(read.load_config(path)),
        "algorithm": spec.algorithm,
        "shape": spec.family,
        "layers": spec.num_layers,
        "feature_layers": list(spec.target_layer_ids),
        "target_layers": spec.num_target_layers,
        # Which slot proposes which token (method.md 3); Eagle-3 has no slots.
        "alignment": aligned if ALGORITHMS[spec.algorithm].parallel else None,
        "proposals_per_round": spec.proposals,
        "sequential_head": f"{spec.markov_head}, rank {spec.markov_rank}" if spec.markov_rank else None,
        "confidence_head": f"sees {seen}" if spec.confidence else None,
        "hidden_size": spec.shape.hidden,
        "vocabulary": spec.vocab_size,
        "draft_vocabulary": spec.draft_vocab_size or spec.vocab_size,
        "mask_token_id": spec.mask_token_id,
        "trained_for": facts.get("target"),
        "thinking": facts.get("thinking"),
        "template_hash": facts.get("template_hash"),
        "tokenizer_hash": facts.get("tokenizer_hash"),
        "held_out_tau": facts.get("held_out_tau"),
        "stored_as": "+".join(stored_as),
        "stored_copies": [name for name in read.SHARED if name in stored],
        "parameters": own,
        "parameters_with_embedding_and_head": own + copies,
        "dtype": str(dtype),
        "gb_added": added * size / 1e9,
        "kv_bytes_per_token": 2 * spec.num_layers * spec.shape.kv_heads * spec.shape.head_dim * size,
    }
    reasons = [] if target is None else misfits(spec, target, target.vocab_size)
    return found | {
        "target": None if target is None else target.name,
        "fits": None if target is None else not reasons,
        "reasons": reasons,
        "doubts": [] if target is None else _doubts(facts, target),
    }


@cache
def parameters(spec: DraftSpec) -> tuple[int, int]:
    """(number of a draft's own parameters, number of those of its embedding [V, d] and its head [K, d])."""
    own = sum(math.prod(shape) for shape in read.draft_shapes(spec).values())
    return own, sum(math.prod(read.copy_shapes(spec)[name]) for name in read.SHARED)


def _doubts(facts: dict[str, Any], target: TargetSpec) -> list[str]:
    """How the target's tokenizer and template differ from those that the draft was trained with."""
    tokenizer = target.tokenizer()
    if tokenizer is None:
        return ["the target has no tokenizer to compare with"] if facts.get("tokenizer_hash") else []
    ours = {"tokenizer": tokenizer_hash(tokenizer)}
    if tokenizer.chat_template:
        ours["template"] = template_hash(tokenizer)
    theirs = {name: facts.get(f"{name}_hash") or "" for name in ours}
    return [
        f"it was trained with {name} {theirs[name][:12]}, and the target's is {hashed[:12]}"
        for name, hashed in ours.items()
        if theirs[name] and theirs[name] != hashed
    ]
