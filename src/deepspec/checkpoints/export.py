"""Drafts in the form that inference servers load, or a refusal that names the way out.

What differs between servers is data: `SERVERS` says how each is started, `SERVED_AS` how they name a kind of
draft, `LIMITS` what a server cannot run, why, and what to do instead. The facts come from the servers' own
loaders (docs/serving.md has the versions); nothing of theirs is imported.

m captured layers, d hidden width, V vocabulary, r Markov rank, N proposals per round.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from string import Template
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
from deepspec.drafts import ALGORITHMS
from deepspec.drafts.spec import DraftSpec, write_config
from deepspec.errors import CheckpointError, UserError
from deepspec.files import atomic_directory, write_json
from deepspec.pocket import packaged
from deepspec.targets import Target

NATIVE = "deepspec"
SILENT_RANK = 8
"""Rank of an all-zero sequential head: any would do; GPU kernels like rows of 16 bytes."""


class Server(NamedTuple):
    """A server that drafts are written for. `launch`: the commands that run one."""

    title: str
    launch: tuple[str, ...]


SERVERS: dict[str, Server] = {
    "vllm": Server(
        "vLLM",
        (
            "vllm serve $target --speculative-config "
            '\'{"method": "$method", "model": "$draft", "num_speculative_tokens": $proposals}\'',
        ),
    ),
    "sglang": Server(
        "SGLang",
        (
            "python -m sglang.launch_server --model-path $target --speculative-algorithm $METHOD "
            "--speculative-draft-model-path $draft --speculative-num-steps $steps --speculative-eagle-topk 1 "
            "--speculative-num-draft-tokens $window",
        ),
    ),
    "llamacpp": Server(
        "llama.cpp",
        (
            "python convert_hf_to_gguf.py $target --outfile target.gguf",
            "python convert_hf_to_gguf.py $draft --target-model-dir $target --outfile draft.gguf",
            "llama-server -m target.gguf -md draft.gguf --spec-type draft-$method "
            "--spec-draft-n-max $proposals --spec-draft-p-min 0 --jinja",
        ),
    ),
}


class Served(NamedTuple):
    """How servers know a kind of draft: its registered architecture, its model type, the method's name."""

    architecture: str
    model_type: str
    method: str


SERVED_AS: dict[str, Served] = {
    "eagle3": Served("LlamaForCausalLMEagle3", "llama", "eagle3"),
    "eagle3, q/k norms": Served("Eagle3Qwen3ForCausalLM", "qwen3", "eagle3"),
    "dflash, fill-in": Served("DFlashDraftModel", "qwen3", "dflash"),
    "dspark": Served("Qwen3DSparkModel", "qwen3", "dspark"),
}


def served_as(spec: DraftSpec) -> Served:
    """How servers know this draft."""
    return SERVED_AS[ALGORITHMS[spec.algorithm].served(spec)]


class Facts(NamedTuple):
    """What limits are about. own: it brings an embedding or a head that may not be the target's.
    target: what it was trained for, where that is at hand."""

    spec: DraftSpec
    own: bool
    target: Target | None

    @property
    def eagle(self) -> bool:
        return served_as(self.spec).method == "eagle3"


class Limit(NamedTuple):
    """What some servers (names, blank-separated) cannot run: when, why, and what to do instead."""

    servers: str
    when: Callable[[Facts], bool]
    why: str
    instead: str


EVERYWHERE = "vllm sglang llamacpp"
LIMITS: tuple[Limit, ...] = (
    Limit(
        EVERYWHERE,
        lambda f: f.spec.family != "qwen3",
        "its layers are Gemma-4-shaped: SGLang registers no such draft, llama.cpp's refuses a soft-capped "
        "head, and vLLM's loader of them was not checked",
        "export with --to deepspec, the released layout (vLLM registers its architecture, Gemma4DSparkModel)",
    ),
    Limit(
        EVERYWHERE,
        lambda f: f.spec.family == "qwen3" and f.spec.softcap is not None,
        "the target soft-caps its logits, and the server's draft would not",
        "run this draft with `deepspec generate`",
    ),
    Limit(
        EVERYWHERE,
        lambda f: f.spec.family == "qwen3" and f.target is not None and f.target.embedding.scale != 1.0,
        "the target scales its embedding by a factor, and the server's draft would not",
        "run this draft with `deepspec generate`",
    ),
    Limit(
        EVERYWHERE,
        lambda f: f.spec.family == "qwen3" and f.target is not None and f.target.head.scale != 1.0,
        "the target scales its logits by a factor, and the server's draft would not",
        "run this draft with `deepspec generate`",
    ),
    Limit(
        EVERYWHERE,
        lambda f: f.spec.family == "qwen3" and f.spec.shape.activation != "silu",
        "its MLP is not gated by SiLU, the only one that the server's draft has",
        "train a draft here: those for targets other than Gemma-4 use SiLU",
    ),
    Limit(
        EVERYWHERE,
        lambda f: f.spec.shape.attention_bias,
        "its attention has biases, which the server's loader drops without a word",
        "train a draft here: those for targets other than Gemma-4 have none",
    ),
    Limit(
        EVERYWHERE,
        lambda f: f.spec.family == "qwen3" and f.spec.shape.rope.kind != "default",
        "its rotary positions are not the default kind",
        "train a draft here: those for targets other than Gemma-4 use the default kind",
    ),
    Limit(
        EVERYWHERE,
        lambda f: f.spec.target_layer_ids[0] < 1,
        "it reads the embedding or layer 0, which the server's spellings of layer ids do not agree on",
        "train with draft.target_layer_ids from 1 to the last layer but one",
    ),
    Limit(
        EVERYWHERE,
        lambda f: not f.eagle and not f.spec.shape.qk_norm,
        "it has no per-head norms of queries and keys, and the server's block drafts do",
        "train with draft.qk_norm=true",
    ),
    Limit(
        "sglang llamacpp",
        lambda f: f.eagle and f.spec.shape.qk_norm,
        "its queries and keys have per-head norms, and the server's only Eagle-3 has none",
        "export with --to vllm (Eagle3Qwen3ForCausalLM), or train with draft.qk_norm=false "
        "(recipe pocket-eagle3-portable)",
    ),
    Limit(
        "llamacpp",
        lambda f: f.eagle and len(f.spec.target_layer_ids) != 3,
        "it does not read exactly three feature layers, as llama.cpp's Eagle-3 does",
        "train with three draft.target_layer_ids, or export with --to vllm or sglang",
    ),
    Limit(
        "vllm llamacpp",
        lambda f: f.spec.markov_rank > 0 and f.spec.markov_head != "vanilla",
        "its sequential head is gated or rnn, and the server knows vanilla only",
        "export with --to sglang, or train with draft.markov_head=vanilla",
    ),
    Limit(
        "sglang llamacpp",
        lambda f: f.own,
        "it brings an embedding and a head of its own, and the server would use the target's",
        "add --target, which leaves copies out where they are equal, or export with --to vllm",
    ),
    Limit(
        "sglang",
        lambda f: not f.eagle and f.spec.draft_vocab_size is not None,
        "its vocabulary is reduced, which SGLang's DFlash and DSpark ignore",
        "export with --to vllm",
    ),
    Limit(
        "sglang",
        lambda f: not f.eagle and f.target is not None and f.target.spec.model_type == "qwen2",
        "SGLang cannot capture the features of a Qwen2 target for DFlash and DSpark",
        "export with --to vllm, or train an Eagle-3 draft",
    ),
)


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
    if to != NATIVE:
        check_tensors(config, tensors)
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


def refuse(to: str, facts: Facts) -> None:
    """Raise UserError with every limit of the server that a draft meets; nothing where it can run."""
    met = [limit for limit in LIMITS if to in limit.servers.split() and limit.when(facts)]
    if met:
        raise UserError(
            f"{SERVERS[to].title} cannot run this draft:\n" + "\n".join(f"  - {limit.why}" for limit in met),
            next_step="; ".join(dict.fromkeys(limit.instead for limit in met)),
        )


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


def expected_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the servers' loaders look for, from a written config alone, copies left out."""
    d, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    eagle = "eagle_config" in config
    width = 2 * d if eagle else d
    m = config["num_aux_hidden_states"] if eagle else len(config["target_layer_ids"])
    want: dict[str, tuple[int, ...]] = {"fc.weight": (d, m * d), "norm.weight": (d,)}
    if not eagle:
        want["hidden_norm.weight"] = (d,)
    for layer in range(config["num_hidden_layers"]):
        inside: dict[str, tuple[int, ...]] = {
            "input_layernorm": (d,),
            "post_attention_layernorm": (d,),
            "self_attn.q_proj": (query, width),
            "self_attn.k_proj": (key, width),
            "self_attn.v_proj": (key, width),
            "self_attn.o_proj": (d, query),
            "mlp.gate_proj": (inner, d),
            "mlp.up_proj": (inner, d),
            "mlp.down_proj": (d, inner),
        }
        if eagle:
            inside["hidden_norm"] = (d,)
        if config["model_type"] == "qwen3":
            inside |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
        at = "midlayer" if eagle else f"layers.{layer}"
        want |= {f"{at}.{name}.weight": shape for name, shape in inside.items()}
    rank = config.get("markov_rank", 0)
    if rank:
        want |= {f"markov_head.markov_{w}.weight": (vocab, rank) for w in ("w1", "w2")}
        if config["markov_head_type"] == "gated":
            want |= {"markov_head.gate_proj.weight": (rank, d + rank), "markov_head.gate_proj.bias": (rank,)}
        if config["markov_head_type"] == "rnn":
            want["markov_head.joint_proj.weight"] = (3 * rank, 2 * rank + d)
            want["markov_head.joint_proj.bias"] = (3 * rank,)
    if config.get("enable_confidence_head"):
        read = d + (rank if config["confidence_head_with_markov"] else 0)
        want |= {"confidence_head.proj.weight": (1, read), "confidence_head.proj.bias": (1,)}
    return want


def check_tensors(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless the tensors are exactly those that the config makes a server expect:
    some servers drop unknown names, and none of them misses an absent one."""
    want = expected_tensors(config)
    rows, vocab, width = config.get("draft_vocab_size"), config["vocab_size"], config["hidden_size"]
    if rows is not None:
        want |= {HEAD: (rows, width), "d2t": (rows,)}
        want |= {
            name: shape for name, shape in ((EMBEDDING, (vocab, width)), ("t2d", (vocab,))) if name in tensors
        }
    elif {EMBEDDING, HEAD} <= tensors.keys():
        want |= {name: (vocab, width) for name in (EMBEDDING, HEAD)}
    have = {name: tuple(t.shape) for name, t in tensors.items()}
    wrong = sorted(name for name in want.keys() | have.keys() if want.get(name) != have.get(name))
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{len(wrong)} tensor(s) are not what a server expects, first {name}: "
            f"{have.get(name, 'absent')}, expected {want.get(name, 'absent')}",
            next_step="compare the checkpoint's config.json with its tensors",
        )


def launch_commands(to: str, spec: DraftSpec, target: str, draft: Path) -> list[str]:
    """The commands that serve an exported draft beside its target."""
    method, count = served_as(spec).method, spec.proposals
    # vLLM's takes the draft inside JSON inside quotes; in the others it is a word of its own.
    inside = json.dumps(str(draft))[1:-1].replace("'", "'\\''")
    words = {
        "target": shlex.quote(target),
        "draft": inside if to == "vllm" else shlex.quote(str(draft)),
        "method": method,
        "METHOD": method.upper(),
        "proposals": count,
        # SGLang drafts a block in one step, and counts the anchor among the tokens it verifies.
        "steps": count if method == "eagle3" else 1,
        "window": spec.block if method == "dflash" else spec.block + 1,
    }
    return [Template(line).substitute(words) for line in SERVERS[to].launch]
