"""What differs between model families, as data: there is one row per family, and no code per family.

Drafts come in two shapes, `qwen3` and `gemma4`; every target that is not Gemma-4 gets a Qwen3-shaped draft.
The row of a target holds only what its draft must repeat. Nothing is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class DraftFamily(NamedTuple):
    """How a draft's layers are connected, and where its config keeps the dimensions (method.md 3-4b)."""

    head_dim_key: str = "head_dim"
    kv_heads_key: str = "num_key_value_heads"
    """Read if keys and values are one (`attention_k_eq_v`); otherwise `num_key_value_heads` is read."""
    activation_key: str = "hidden_act"
    activation: str = "silu"
    rope_entry: str | None = None
    """The name of the nested rope entry to read; None if the rope facts are not nested."""
    attention_scale: float | None = None
    """None means 1/sqrt(head dim)."""
    value_norm: bool = False
    sandwich: bool = False


DRAFT_FAMILIES: dict[str, DraftFamily] = {
    "qwen3": DraftFamily(),
    "gemma4": DraftFamily(
        head_dim_key="global_head_dim",
        kv_heads_key="num_global_key_value_heads",
        activation_key="hidden_activation",
        activation="gelu_pytorch_tanh",
        rope_entry="full_attention",
        attention_scale=1.0,
        value_norm=True,
        sandwich=True,
    ),
}


# Names of the final norm, for which Hugging Face models have no method. The decoder is the module that has
# `layers` and one of these; embedding and head come from get_input_embeddings and get_output_embeddings.
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "final_norm", "embedding_norm", "norm_f")
SOFTCAP = "final_logit_softcapping"
# Kinds of layers (`layer_types`) whose masks can be made for rows of different lengths.
MASKED_LAYERS = frozenset({"full_attention", "sliding_attention"})
# Kinds of rotary positions whose frequencies change, for all keys, once a sequence passes some length.
LENGTH_DEPENDENT_ROPE = frozenset({"longrope", "dynamic"})
# Kinds by which a target reads `factor` times the positions that it was first trained for. For other kinds
# (llama3, longrope), and in Gemma-3, max_position_embeddings is the extended length already.
SCALED_ROPE = frozenset({"linear", "dynamic", "yarn"})
ALREADY_SCALED = frozenset({"gemma3", "gemma3_text"})


class TargetFamily(NamedTuple):
    """Facts of a target that the generic Hugging Face interface does not provide."""

    draft: str = "qwen3"
    mask_token_id: int | None = None
    """A token that the family reserves and never writes; if it is None, a rule chooses one."""
    embedding_factor: str | None = None
    """Config key of a factor on the embedding's output; if it is None, the embedding module knows the factor
    (Gemma), or the factor is 1."""
    logit_factor: tuple[str, int] | None = None
    """Config key of a factor on the logits, and its power (-1 means that the logits are divided by it)."""


_GRANITE = TargetFamily(embedding_factor="embedding_multiplier", logit_factor=("logits_scaling", -1))
_COHERE = TargetFamily(logit_factor=("logit_scale", 1))

TARGET_FAMILIES: dict[str, TargetFamily] = {
    "gemma4": TargetFamily("gemma4", 4),
    "gemma4_text": TargetFamily("gemma4", 4),
    "gemma4_unified": TargetFamily("gemma4", 4),
    "gemma4_unified_text": TargetFamily("gemma4", 4),
    "qwen3": TargetFamily("qwen3", 151669),
    "cohere": _COHERE,
    "cohere2": _COHERE,
    "cohere2_moe": _COHERE,
    "granite": _GRANITE,
    "granite_swa": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoe_swa": _GRANITE,
    "granitemoehybrid": _GRANITE,
    "granitemoeshared": _GRANITE,
    "hyperclovax": TargetFamily(embedding_factor="embedding_multiplier", logit_factor=("logits_scaling", 1)),
    "falcon_h1": TargetFamily(
        embedding_factor="embedding_multiplier", logit_factor=("lm_head_multiplier", 1)
    ),
    "minicpm3": TargetFamily(logit_factor=("logits_scaling", -1)),
}


def target_family(model_type: str) -> TargetFamily:
    """The row of a target's `model_type`; an unknown type has no special facts."""
    return TARGET_FAMILIES.get(model_type, TargetFamily())


def rope_facts(config: dict[str, Any], family: DraftFamily) -> dict[str, Any]:
    """The rope facts that a draft uses: theta, kind, partial factor, and any scaling fields."""
    entry = _rope(config)
    if family.rope_entry is not None:
        entry = entry.get(family.rope_entry) or {}
    elif isinstance(entry.get("full_attention"), dict):
        # The sliding layers of this target use other frequencies; a draft attends to everything.
        entry = entry["full_attention"]
    theta = entry.get("rope_theta") or config.get("rope_theta") or 10000.0
    return {**entry, "rope_theta": float(theta), "rope_type": _rope_type(entry)}


def context_length(config: Mapping[str, Any]) -> int | None:
    """Tokens that a model of this text config reads; None if the config gives no limit.

    A scaled kind of rotary positions reads factor * original_max_position_embeddings, or factor *
    max_position_embeddings if the original length is not given.
    """
    limit = config.get("max_position_embeddings")
    rope = _rope(config)
    entries = [rope, *(entry for entry in rope.values() if isinstance(entry, dict))]
    scaled = [e for e in entries if _rope_type(e) in SCALED_ROPE and e.get("factor")]
    if scaled and config.get("model_type") not in ALREADY_SCALED:
        keys, whole = "original_max_position_embeddings", config
        lengths = [(whole.get(keys) or e.get(keys) or limit or 0) * float(e["factor"]) for e in scaled]
        limit = int(max(lengths))
    return limit or None


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The raw rope facts, flat or nested by kind of layer; an older key takes precedence in transformers."""
    found: dict[str, Any] = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return found


def _rope_type(entry: Mapping[str, Any]) -> str:
    """The kind of rotary positions of one rope entry. M-RoPE is the default kind as far as text goes."""
    kind = str(entry.get("rope_type") or entry.get("type") or "default")
    return "default" if kind == "mrope" else kind


def default_target_layers(depth: int, count: int = 5) -> list[int]:
    """Layers round(1 + i * (depth - 4) / (count - 1)), without duplicates and never the last (method.md 2).

    depth: the number of the target's decoder layers; count: of the layers to choose, five in the method.
    Raises ValueError if the depth is below two.
    """
    if depth < 2:
        raise ValueError(f"a target of {depth} layer(s) has no inner layer to read features from")
    step = max(depth - 4, 0) / max(count - 1, 1)
    return sorted({min(int(1 + i * step + 0.5), depth - 2) for i in range(count)})
