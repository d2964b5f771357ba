"""The spec of a draft, read from a released config and written to one.

A draft's config is a copy of its target's text config with the draft's own keys on top: `num_hidden_layers`
is the draft's depth, and the other dimensions are the target's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

from deepspec import families
from deepspec.drafts import ALGORITHMS, MARKOV_HEADS, algorithm_of

# Variants of Eagle-3 that other trainers use and the published drafts do not; an absent key means no.
EAGLE3_NORMS = ("norm_before_fc", "norm_before_residual", "norm_output")
# Keys of some kinds of drafts or of other layouts: what `write_config` starts from may not bring them in.
OWN_KEYS = {
    *EAGLE3_NORMS,
    *("draft_vocab_size", "draft_num_hidden_layers", "ttt_length", "step_loss_decay"),
    *("block_size", "mask_token_id", "sample_from_anchor", "markov_rank", "markov_head_type"),
    *("enable_confidence_head", "confidence_head_with_markov", "dflash_config", "auto_map"),
}


ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
"""The functions that may gate a draft's MLP; `layers.py` has them."""


@dataclass(frozen=True)
class RopeFacts:
    """The rotary positions of a draft. kind: "default" or "proportional"; partial: the share of dimensions
    that are rotated (proportional only)."""

    theta: float = 10000.0
    kind: str = "default"
    partial: float = 1.0
    rounded: bool = False
    """Whether the frequencies are rounded to bfloat16, as in some published drafts; never in new drafts."""


@dataclass(frozen=True)
class LayerShape:
    """Dimensions and family facts of a draft's layers."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float = 1e-6
    activation: str = "silu"
    attention_bias: bool = False
    qk_norm: bool = True
    """Per-head norms of queries and keys. All released drafts have them; most servers' Eagle-3 does not."""
    attention_scale: float | None = None
    value_is_key: bool = False
    value_norm: bool = False
    sandwich: bool = False
    rope: RopeFacts = RopeFacts()


@dataclass(frozen=True)
class DraftSpec:
    """Everything about a draft except its weights.

    algorithm: a key of `ALGORITHMS`. block: the number of slots γ (for Eagle-3, the unroll length).
    target_layer_ids: 0-based decoder layers whose outputs are the features; -1 is the embedding.
    num_target_layers: None if the checkpoint does not contain it.
    draft_vocab_size: the rows of the draft's own head if its vocabulary is reduced, else None.
    norm_before_fc, norm_before_residual, norm_output (Eagle-3): whether there is a norm over all features
    before `fc`; whether the residual is taken after the norm of the hidden half; whether the hidden state is
    fed back after the last norm.
    """

    algorithm: str
    family: str
    shape: LayerShape
    num_layers: int
    block: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int | None
    vocab_size: int
    mask_token_id: int | None = None
    sample_from_anchor: bool = True
    markov_rank: int = 0
    markov_head: str = "vanilla"
    confidence: bool = False
    confidence_with_markov: bool = True
    softcap: float | None = None
    draft_vocab_size: int | None = None
    norm_before_fc: bool = False
    norm_before_residual: bool = False
    norm_output: bool = False
    step_loss_decay: float = field(default=0.8, compare=False)
    """Eagle-3: step s of the unroll has this weight to the power of s in the loss."""

    @property
    def proposals(self) -> int:
        """γ, the most tokens that one round proposes. In the older alignment slot 0 proposes nothing."""
        skips_first = ALGORITHMS[self.algorithm].parallel and not self.sample_from_anchor
        return self.block - 1 if skips_first else self.block


class SpecError(ValueError):
    """No draft can be built from a config; the message names the key and the reason."""


def layer_shape(config: dict[str, Any], family_name: str, *, rope_rounded: bool = False) -> LayerShape:
    """The layer dimensions and family facts of a raw config. Raises SpecError."""
    family = families.DRAFT_FAMILIES[family_name]
    value_is_key = family_name == "gemma4" and bool(config.get("attention_k_eq_v", False))
    heads = _count(config, "num_attention_heads")
    kv_key = family.kv_heads_key if value_is_key else "num_key_value_heads"
    sizes = {
        "head_dim": config.get(family.head_dim_key)
        or config.get("head_dim")
        or _count(config, "hidden_size") // heads,
        "num_key_value_heads": config.get(kv_key) or config.get("num_key_value_heads") or heads,
    }
    activation = config.get(family.activation_key) or family.activation
    if activation not in ACTIVATIONS:
        raise SpecError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    rope = families.rope_facts(config, family)
    if rope["rope_type"] not in ("default", "proportional"):
        raise SpecError(
            f"rope_type {rope['rope_type']!r} is not supported in a draft; default and proportional are"
        )
    return LayerShape(
        hidden=_count(config, "hidden_size"),
        intermediate=_count(config, "intermediate_size"),
        heads=heads,
        kv_heads=_count(sizes, "num_key_value_heads"),
        head_dim=_count(sizes, "head_dim"),
        eps=float(config.get("rms_norm_eps", 1e-6)),
        activation=activation,
        attention_bias=bool(config.get("attention_bias", False)),
        # Released configs do not have this key: without it, the norms are there.
        qk_norm=bool(config.get("qk_norm", True)),
        attention_scale=family.attention_scale,
        value_is_key=value_is_key,
        value_norm=family.value_norm,
        sandwich=family.sandwich,
        rope=RopeFacts(
            theta=rope["rope_theta"],
            kind=rope["rope_type"],
            partial=float(rope.get("partial_rotary_factor") or 1.0),
            rounded=rope_rounded,
        ),
    )


def _need(config: dict[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise SpecError(f"the config has no {key!r}")
    return config[key]


def _count(config: dict[str, Any], key: str, least: int = 1) -> int:
    value = _need(config, key)
    if type(value) is not int or value < least:
        raise SpecError(f"{key} is {value!r}, not a whole number of at least {least}")
    return value


def read_spec(config: dict[str, Any], *, rope_rounded: bool = False) -> DraftSpec:
    """The spec of a draft with a released-layout config. Raises SpecError if it is not a draft's config."""
    known = algorithm_of(config)
    if known is None:
        architecture = (config.get("architectures") or ["(none)"])[0]
        names = dict.fromkeys(a for row in ALGORITHMS.values() for a in row.architectures.values())
        raise SpecError(f"architecture {architecture!r} is not a draft's; known ones are {', '.join(names)}")
    algorithm, family = known
    if "num_target_layers" not in config:
        raise SpecError("the config has no 'num_target_layers'")
    windows = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if windows:
        raise SpecError(
            f"layer_types has {', '.join(windows)}, but only full_attention is supported in a draft"
        )
    ids = _need(config, "target_layer_ids")
    if not isinstance(ids, list | tuple) or any(type(i) is not int for i in ids):
        raise SpecError(f"target_layer_ids is {ids!r}, not a list of whole numbers")
    # The depth is null if another layout does not contain it.
    depth = None if config["num_target_layers"] is None else _count(config, "num_target_layers")
    own: dict[str, Any] = {name: bool(config.get(name, False)) for name in EAGLE3_NORMS}
    softcap, rows = config.get("final_logit_softcapping"), config.get("draft_vocab_size")
    own["step_loss_decay"] = float(config.get("step_loss_decay", 0.8))
    if ALGORITHMS[algorithm].parallel:
        own = {
            "mask_token_id": _count(config, "mask_token_id", least=0),
            # Released configs do not have this key: without it, it is true (method.md 3, Alignment).
            "sample_from_anchor": bool(config.get("sample_from_anchor", True)),
            "markov_rank": int(config.get("markov_rank") or 0),
            "markov_head": config.get("markov_head_type") or "vanilla",
            "confidence": bool(config.get("enable_confidence_head", False)),
            "confidence_with_markov": bool(config.get("confidence_head_with_markov", False)),
        }
    return _checked(
        DraftSpec(
            algorithm=algorithm,
            family=family,
            shape=layer_shape(config, family, rope_rounded=rope_rounded),
            num_layers=_count(config, "num_hidden_layers"),
            block=_count(config, "block_size" if ALGORITHMS[algorithm].parallel else "ttt_length", least=0),
            target_layer_ids=tuple(ids),
            num_target_layers=depth,
            vocab_size=_count(config, "vocab_size"),
            softcap=None if softcap is None else float(softcap),
            draft_vocab_size=None if rows is None else _count(config, "draft_vocab_size"),
            **own,
        )
    )


def _checked(spec: DraftSpec) -> DraftSpec:
    """The spec, if its parts agree with each other; raises SpecError otherwise."""
    ids = spec.target_layer_ids
    if list(ids) != sorted(set(ids)) or not ids:
        raise SpecError(f"target_layer_ids must rise strictly, and {list(ids)} does not")
    depth = spec.num_target_layers
    if ids[0] < -1 or (depth is not None and ids[-1] >= depth - 1):
        most = "" if depth is None else f" and at most {depth - 2} (the last of {depth} layers is never read)"
        raise SpecError(f"target_layer_ids must be at least -1 (the embedding){most}, not {list(ids)}")
    row = ALGORITHMS[spec.algorithm]
    if row.layers not in (None, spec.num_layers):
        raise SpecError(f"an {row.title} draft has {row.layers} layer(s), not {spec.num_layers}")
    if spec.mask_token_id is not None and not 0 <= spec.mask_token_id < spec.vocab_size:
        raise SpecError(f"mask_token_id {spec.mask_token_id} is outside the vocabulary of {spec.vocab_size}")
    if spec.markov_head not in MARKOV_HEADS:
        raise SpecError(f"markov_head_type {spec.markov_head!r} is not one of {', '.join(MARKOV_HEADS)}")
    rows = spec.draft_vocab_size
    if rows is not None and not 1 <= rows <= spec.vocab_size:
        raise SpecError(f"draft_vocab_size {rows} is not between 1 and the vocabulary of {spec.vocab_size}")
    if spec.block < 1 or spec.proposals < 1:
        raise SpecError(f"a block of {spec.block} slot(s) proposes nothing")
    # Facts of heads that are off get one spelling, so that a spec equals the one read back from its config.
    return replace(
        spec,
        draft_vocab_size=None if rows == spec.vocab_size else rows,
        markov_head=spec.markov_head if spec.markov_rank else "vanilla",
        confidence_with_markov=bool(spec.confidence and spec.markov_rank and spec.confidence_with_markov),
    )


def new_spec(
    target_config: dict[str, Any],
    *,
    algorithm: str,
    num_layers: int,
    block: int,
    target_layer_ids: list[int] | None = None,
    feature_layers: int = 5,
    mask_token_id: int | None = None,
    intermediate_size: int | None = None,
    qk_norm: bool = True,
    **options: Any,
) -> DraftSpec:
    """The spec of a new draft for a target, from the target's raw text config.

    By default a rule chooses the feature layers, as many as `feature_layers` (method.md 2). options: other
    fields of `DraftSpec`. A draft for an unknown family is Qwen3-shaped and uses plain rotary positions,
    whatever the target's rope scaling. Raises SpecError.
    """
    row = families.target_family(target_config.get("model_type", ""))
    facts = {**target_config, "qk_norm": qk_norm}
    if intermediate_size is not None:
        facts["intermediate_size"] = intermediate_size
    if row.draft == "qwen3":
        theta = families.rope_facts(facts, families.DRAFT_FAMILIES["qwen3"])["rope_theta"]
        facts["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"}
        facts["hidden_act"] = "silu"
        facts["attention_bias"] = False
    depth = _count(facts, "num_hidden_layers")
    return _checked(
        DraftSpec(
            algorithm=algorithm,
            family=row.draft,
            shape=layer_shape(facts, row.draft),
            num_layers=num_layers,
            block=block,
            target_layer_ids=tuple(target_layer_ids or families.default_target_layers(depth, feature_layers)),
            num_target_layers=depth,
            vocab_size=_count(facts, "vocab_size"),
            mask_token_id=mask_token_id if ALGORITHMS[algorithm].needs_mask else None,
            softcap=facts.get("final_logit_softcapping"),
            **options,
        )
    )


def write_config(spec: DraftSpec, target_config: dict[str, Any]) -> dict[str, Any]:
    """A config.json in the released layout: the target's text config with the draft's keys on top."""
    config = {k: copy.deepcopy(v) for k, v in target_config.items() if k not in OWN_KEYS}
    row, shape = ALGORITHMS[spec.algorithm], spec.shape
    config.update(
        architectures=[row.architectures[spec.family]],
        model_type="qwen3" if spec.family == "qwen3" else config.get("model_type", "gemma4_text"),
        num_target_layers=spec.num_target_layers,
        num_hidden_layers=spec.num_layers,
        layer_types=["full_attention"] * spec.num_layers,
        target_layer_ids=list(spec.target_layer_ids),
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        vocab_size=spec.vocab_size,
        rms_norm_eps=shape.eps,
        attention_bias=shape.attention_bias,
        qk_norm=shape.qk_norm,
        tie_word_embeddings=False,
    )
    if spec.family == "qwen3":
        # The target's scaled positions become plain ones, of the length that they reached.
        if (reached := families.context_length(target_config)) is not None:
            config["max_position_embeddings"] = reached
        config.update(
            head_dim=shape.head_dim,
            num_key_value_heads=shape.kv_heads,
            hidden_act=shape.activation,
            rope_parameters={"rope_theta": shape.rope.theta, "rope_type": shape.rope.kind},
        )
        for key in ("rope_scaling", "rope_theta", "original_max_position_embeddings"):
            config.pop(key, None)
    if spec.draft_vocab_size is not None:
        config["draft_vocab_size"] = spec.draft_vocab_size
    if not row.parallel:
        config.update(
            draft_num_hidden_layers=spec.num_layers,
            ttt_length=spec.block,
            step_loss_decay=spec.step_loss_decay,
        )
        config.update({name: True for name in EAGLE3_NORMS if getattr(spec, name)})
        return config
    config.update(
        block_size=spec.block,
        mask_token_id=spec.mask_token_id,
        sample_from_anchor=spec.sample_from_anchor,
        markov_rank=spec.markov_rank,
        enable_confidence_head=spec.confidence,
    )
    if spec.markov_rank:
        config["markov_head_type"] = spec.markov_head
    if spec.confidence:
        config["confidence_head_with_markov"] = spec.confidence_with_markov
    return config
