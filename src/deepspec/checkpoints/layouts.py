"""Configs of other trainers, translated to the released layout, which `spec.read_spec` then reads.

The tensors have the same names in all three layouts. A draft that our classes cannot compute is refused here,
with the reason: read as something else it would load without an error and propose badly.
"""

from __future__ import annotations

from typing import Any

from deepspec.drafts import ALGORITHMS
from deepspec.drafts.spec import EAGLE3_NORMS, SpecError

OLDER_DFLASH = "DFlashDraftModel"
NESTED = {"target_layer_ids", "mask_token_id", "block_size", "num_target_layers", "sample_from_anchor"}
WITHOUT_EFFECT = {"use_aux_hidden_state", "mask_token"}
"""The other keys that the nested `dflash_config` may have."""
SPECULATORS = ("eagle3", "dflash", "dspark")
"""The algorithms of that package that can be read; their names are the same here."""


def layout_of(config: dict[str, Any]) -> str:
    """The name of a config's layout: released, older-dflash or speculators."""
    if "speculators_model_type" in config:
        return "speculators"
    return "older-dflash" if (config.get("architectures") or [None])[0] == OLDER_DFLASH else "released"


def as_released(config: dict[str, Any], target_depth: int | None = None) -> dict[str, Any]:
    """A raw config.json of any layout, translated to the released layout.

    target_depth: the number of the target's decoder layers, if it is known. Raises SpecError.
    """
    layout = layout_of(config)
    if layout == "speculators":
        return from_speculators(config, target_depth)
    return from_older_dflash(config) if layout == "older-dflash" else config


def from_older_dflash(config: dict[str, Any]) -> dict[str, Any]:
    """A config of the first DFlash layout, translated: its facts are nested in `dflash_config`, and slot 0
    proposes nothing unless the config says so."""
    nested = config.get("dflash_config") or {}
    known = NESTED | WITHOUT_EFFECT
    strange = sorted(k for k, v in nested.items() if k not in known and v not in (None, False))
    if config.get("is_causal"):
        strange.append("is_causal")
    if strange:
        raise SpecError(f"a DFlash draft with {', '.join(strange)} is not supported")
    facts = {**config, **{k: v for k, v in nested.items() if v is not None}}
    return {
        **facts,
        "architectures": ["Qwen3DSparkModel"],
        "num_target_layers": facts.get("num_target_layers"),
        "sample_from_anchor": facts.get("sample_from_anchor", False),
    }


def from_speculators(config: dict[str, Any], target_depth: int | None = None) -> dict[str, Any]:
    """A config of the speculators package, translated: a decoder config with the draft's facts around it."""
    kind, inner = config["speculators_model_type"], config.get("transformer_layer_config")
    if kind not in SPECULATORS:
        raise SpecError(
            f"speculators_model_type {kind!r} is not supported, only {', '.join(SPECULATORS)} are"
        )
    if not isinstance(inner, dict):
        raise SpecError("the config has no 'transformer_layer_config'")
    shape = inner.get("model_type")
    if shape not in (("llama", "qwen3") if kind == "eagle3" else ("qwen3",)):
        raise SpecError(f"the draft's layers are of model_type {shape!r}, which is not supported for {kind}")
    for key, where in (("mlp_bias", inner), ("fc_norm", config), ("target_hidden_size", config)):
        if where.get(key) and where[key] != inner.get("hidden_size"):
            raise SpecError(f"{key} is {where[key]!r}, and a draft with that is not supported")
    released = {
        **inner,
        "architectures": [ALGORITHMS[kind].architectures["qwen3"]],
        "num_target_layers": target_depth,
        "draft_vocab_size": config.get("draft_vocab_size"),
        "qk_norm": shape == "qwen3",
    }
    if kind == "eagle3":
        ids = config.get("eagle_aux_hidden_state_layer_ids") or _usual_layers(target_depth)
        norms = {name: bool(config.get(name, False)) for name in EAGLE3_NORMS}
        released |= {"ttt_length": _proposals(config), **norms}
    else:
        ids = config.get("aux_hidden_state_layer_ids")
        dspark = kind == "dspark"
        released |= {key: config.get(key) for key in ("block_size", "mask_token_id", "markov_head_type")}
        released |= {
            "markov_rank": config.get("markov_rank", 256) if dspark else 0,
            "enable_confidence_head": dspark and config.get("enable_confidence_head", True),
            "confidence_head_with_markov": config.get("confidence_head_with_markov", True),
            "sample_from_anchor": config.get("sample_from_anchor", dspark),
        }
    # Their ids name what enters a layer, ours what leaves it.
    released["target_layer_ids"] = None if ids is None else [i - 1 for i in ids]
    return released


def _usual_layers(depth: int | None) -> list[int]:
    """The feature layers that the speculators package reads if the config has null, by the target's depth."""
    if depth is None:
        raise SpecError(
            "eagle_aux_hidden_state_layer_ids is null, which depends on the target's depth: give the target"
        )
    return [2, depth // 2, depth - 3]


def _proposals(config: dict[str, Any]) -> int:
    """Tokens per round of an Eagle-3 draft; only its proposal method contains that number."""
    try:
        return int(config["speculators_config"]["proposal_methods"][0]["speculative_tokens"])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise SpecError(
            "speculators_config.proposal_methods[0].speculative_tokens is missing or not a number"
        ) from error
