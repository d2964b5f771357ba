"""Drafts as GGUF files, which llama.cpp loads. Keys, tensors and tokenizer are those that llama.cpp's own
converter writes (docs/serving.md names the release; tests/test_gguf_draft.py compares).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from deepspec.checkpoints.export import Exported, Ready, prepare
from deepspec.checkpoints.gguf_tokenizer import copied, import_gguf, read_keys, written
from deepspec.checkpoints.read import MAPS, OFFSETS
from deepspec.checkpoints.servers import GGUF, launch_commands, served_as
from deepspec.drafts.spec import LayerShape
from deepspec.errors import CheckpointError, UserError
from deepspec.files import atomic_file, check_writable
from deepspec.pocket import packaged
from deepspec.targets import Target, TargetSpec
from deepspec.targets.gguf_file import find_gguf

ARCHITECTURES = ("eagle3", "dflash")
"""What llama.cpp calls drafts; a DSpark draft is a dflash with a sequential head."""


FORMATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
"""Number formats by the names that users give."""
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "hidden_norm": "attn_norm_2",
}
"""What GGUF calls the parts of a layer; hidden_norm is Eagle-3's."""
TOP = {
    "fc": "fc",
    "norm": "output_norm",
    "lm_head": "output",
    "hidden_norm": "enc.output_norm",
    "input_norm": "enc.output_norm",
    "markov_head.markov_w1": "markov_w1",
    "markov_head.markov_w2": "markov_w2",
    "confidence_head.proj": "conf_proj",
}
"""What GGUF calls the rest: hidden_norm is a block draft's, input_norm Eagle-3's, lm_head that of a reduced
vocabulary."""


def export_gguf(
    name_or_path: str | Path,
    out: Path,
    target: Target,
    *,
    dtype: str | None = None,
    pre: str | None = None,
    served: Path | None = None,
) -> Exported:
    """Write a draft as a GGUF file, whole or not at all.

    dtype: a key of `FORMATS` for the matrices; norms and biases are float32. None keeps the stored one.
    served: the target's GGUF file, whose tokenizer is copied; without it, the target's own tokenizer is
    written, and `pre` overrides the name of its splitting rule. Raises the errors of `export_draft`.
    """
    gguf = import_gguf()
    check_free_file(out)
    ready = prepare(name_or_path, GGUF, target)
    stored = str(ready.tensors["fc.weight"].dtype).removeprefix("torch.")
    kind = FORMATS[dtype or (stored if stored in FORMATS else "float32")]
    served = served or find_gguf(target.spec.name)
    eagle = ready.spec.algorithm == "eagle3"
    writer = gguf.GGUFWriter(None, ARCHITECTURES[not eagle])
    mask = None if eagle else ready.spec.mask_token_id
    if served is not None:
        copied(writer, served, ready.spec.vocab_size, mask)
    else:
        written(writer, target.spec, ready.spec.vocab_size, mask, pre, eagle)
    for name, tensor in _tensors(ready):
        data, found = _quantised(gguf, name, tensor, kind)
        writer.add_tensor(name, data, raw_dtype=found)
    if (offsets := ready.tensors.get(OFFSETS)) is not None:
        # A reduced vocabulary: the target's id of each row of the head.
        ids = (offsets + torch.arange(len(offsets))).numpy()
        writer.add_tensor(OFFSETS, ids, raw_dtype=gguf.GGMLQuantizationType.I64)
    _add_facts(gguf, writer, ready, target.spec, Path(str(name_or_path)).name, kind)
    with atomic_file(out) as stream:
        # The writer opens the file by its name; the stream is there to make it durable.
        writer.write_header_to_file(Path(stream.name))
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    (architecture,), count = ready.config["architectures"], sum(t.numel() for t in ready.tensors.values())
    launch = launch_commands(GGUF, ready.spec, packaged(target.spec.name), out, served)
    return Exported(out, GGUF, architecture, ready.spec.proposals, kind, count, launch, ready.notes)


def check_free_file(out: Path) -> None:
    """Raise UserError unless `out` can be written, and is free or an earlier draft, which is replaced."""
    if out.suffix != ".gguf":
        raise UserError(
            f"{out} is not the name of a GGUF file", next_step="give --out a file name that ends in .gguf"
        )
    try:
        fine = not out.is_file() or read_keys(out).get("general.architecture") in ARCHITECTURES
    except CheckpointError:
        fine = False
    if not fine:
        raise UserError(
            "the output file is not a draft, and an export would replace it",
            where=str(out),
            next_step="give --out the name of a new file, or of an earlier export",
        )
    check_writable(out)


def _tensors(ready: Ready) -> Iterator[tuple[str, Tensor]]:
    """(name in GGUF, tensor) of a draft, in the order of the names in the checkpoint."""
    shape = ready.spec.shape
    for name, tensor in sorted(ready.tensors.items()):
        if name in MAPS:
            continue
        stem, _, ending = name.rpartition(".")
        layer = re.fullmatch(r"(?:layers\.(\d+)|midlayer)\.(.+)", stem)
        if layer is None:
            yield f"{TOP[stem]}.{ending}", tensor
            continue
        number, part = layer[1] or "0", PARTS[layer[2]]
        if ready.spec.algorithm == "eagle3":
            tensor = _interleaved(part, tensor, shape)
        yield f"blk.{number}.{part}.{ending}", tensor


def _interleaved(part: str, tensor: Tensor, shape: LayerShape) -> Tensor:
    """Queries and keys with the pairs that rotate together side by side: llama.cpp takes Eagle-3 drafts for
    Llama layers, which it rotates that way."""
    heads = {"attn_q": shape.heads, "attn_k": shape.kv_heads}.get(part)
    if heads is None:
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _quantised(gguf: ModuleType, name: str, tensor: Tensor, kind: str) -> tuple[Any, Any]:
    """(array, its number format): what is not a matrix is float32, and so are norms."""
    values = tensor.float().contiguous().numpy()
    plain = values.ndim < 2 or name.endswith("_norm.weight") or not name.endswith(".weight")
    found = gguf.GGMLQuantizationType["F32" if plain else kind]
    try:
        return gguf.quants.quantize(values, found), found
    except gguf.QuantError:  # rows that are not made of whole blocks of 32
        found = gguf.GGMLQuantizationType.F16
        return gguf.quants.quantize(values, found), found


def _add_facts(gguf: ModuleType, writer: Any, ready: Ready, target: TargetSpec, name: str, kind: str) -> None:
    """The keys that describe a draft, apart from its tokenizer."""
    spec, shape, config, arch = ready.spec, ready.spec.shape, ready.config, writer.arch
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_freq_base(shape.rope.theta)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    # llama.cpp numbers what enters a layer, we what leaves it.
    writer.add_array(f"{arch}.target_layers", [k + 1 for k in spec.target_layer_ids])
    if arch == "eagle3":
        writer.add_uint32(f"{arch}.target_hidden_size", target.hidden_size)
        writer.add_bool(f"{arch}.norm_before_residual", spec.norm_before_residual)
        writer.add_bool(f"{arch}.norm_before_fc", spec.norm_before_fc)
        writer.add_vocab_size(spec.vocab_size)
        writer.add_rope_dimension_count(shape.head_dim)
        return
    writer.add_uint32(f"{arch}.block_size", spec.block)
    writer.add_causal_attention(False)
    if served_as(spec).method == "dspark":
        writer.add_bool(f"{arch}.sample_from_anchor", spec.sample_from_anchor)
        writer.add_bool(f"{arch}.has_confidence_head", spec.confidence)
    rope = target.config.get("rope_parameters") or target.config.get("rope_scaling") or {}
    if "mrope_section" in rope:  # positions of pictures: the draft uses only that of the text
        writer.add_rope_dimension_sections([shape.head_dim // 2, 0, 0, 0])


# ── read back ─────────────────────────────────────────────────────────────────────────────────────────


def inspect_gguf(path: Path, target: TargetSpec | None = None) -> dict[str, Any]:
    """Facts of a draft in a GGUF file, and whether its dimensions fit a target, as `inspect_draft` gives
    them. Raises CheckpointError."""
    keys = read_keys(path)
    arch = keys.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise CheckpointError(
            f"this GGUF file is not a draft: its architecture is {arch}",
            where=str(path),
            next_step=f"give a draft's file ({' or '.join(ARCHITECTURES)}), or a checkpoint directory",
        )
    tensors = {t.name: t for t in import_gguf().GGUFReader(path).tensors}
    facts = {key.removeprefix(f"{arch}."): value for key, value in keys.items()}
    first = tensors.get("markov_w1.weight")
    layers, vocabulary = [k - 1 for k in facts["target_layers"]], len(keys["tokenizer.ggml.tokens"])
    block, anchored = facts.get("block_size"), facts.get("sample_from_anchor", False)
    found = {
        "draft": str(path),
        "layout": GGUF,
        "algorithm": "dspark" if first is not None else arch,
        "name": keys.get("general.name"),
        "layers": facts["block_count"],
        "feature_layers": layers,
        "alignment": ("anchor-first" if anchored else "fill-in") if block else None,
        "proposals_per_round": block and block - (not anchored),
        "sequential_head": None if first is None else f"vanilla, rank {first.shape[0]}",
        "confidence_head": "sees the previous token" if facts.get("has_confidence_head") else None,
        "hidden_size": facts["embedding_length"],
        "vocabulary": vocabulary,
        "draft_vocabulary": int(tensors[OFFSETS].n_elements) if OFFSETS in tensors else vocabulary,
        "splitting": keys.get("tokenizer.ggml.pre"),
        "mask_token_id": keys.get("tokenizer.ggml.mask_token_id"),
        "stored_as": "+".join(sorted({t.tensor_type.name for t in tensors.values()})),
        "parameters": sum(int(t.n_elements) for t in tensors.values()),
        "gb_added": sum(int(t.n_bytes) for t in tensors.values()) / 1e9,
    }
    reasons = [] if target is None else _misfits(found, target)
    fits = None if target is None else not reasons
    name = None if target is None else target.name
    return found | {"target": name, "fits": fits, "reasons": reasons, "doubts": []}


def _misfits(found: dict[str, Any], target: TargetSpec) -> list[str]:
    pairs = (
        ("hidden width", found["hidden_size"], target.hidden_size),
        ("vocabulary", found["vocabulary"], target.vocab_size),
    )
    reasons = [f"{what}: the draft has {a}, the target {b}" for what, a, b in pairs if a != b]
    deepest = max(found["feature_layers"])
    if deepest >= target.num_layers:
        reasons.append(f"it reads layer {deepest}, and the target has {target.num_layers} layers")
    return reasons
