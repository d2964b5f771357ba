"""The dimensions of a target and of a draft, as the named numbers that formulas are written in.

Of the target: hidden (d), layers, vocab (V), width (bytes of a number), queries (query heads × head width),
kv (numbers kept for each token and layer), copies (1 where embedding and head are one), parameters; matrix
weights of a layer's attention, of a dense mlp, of a mixture's experts and of the chosen ones that a token
passes; sparse (layers with a mixture); body (weights of all layers) and active (those that a token passes).

Of the draft: parallel (1 if a block is filled in one pass, 0 if it is unrolled as in Eagle-3), draft_layers,
block (γ; Eagle-3: unroll steps), feature_layers (m), rank (Markov head), own (parameters), own_vocab (rows of
its head), draft_width, draft_queries, draft_kv, draft_mlp, draft_heads; matrix weights of fc, and of a layer
those of keys and values (kv_weights) and the others (row_weights); small (norms and confidence head: what is
left of its own parameters).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from deepspec.cost.formulas import body_weights, target_parameters
from deepspec.drafts import ALGORITHMS
from deepspec.drafts.spec import DraftSpec
from deepspec.features.formats import NUMBER_BYTES

PUBLISHED_TARGETS: dict[str, dict[str, Any]] = yaml.safe_load(
    Path(__file__).with_name("published_targets.yaml").read_text(encoding="utf-8")
)
"""Text configs by Hub id."""


def target_dimensions(config: Mapping[str, Any]) -> dict[str, float]:
    """The named numbers of a target's raw text config.

    Layers are counted as softmax attention (or DeepSeek's latent attention) with a gated MLP or routed
    experts; what else a family has is small, or is not counted.
    """
    d, depth = int(config["hidden_size"]), int(config["num_hidden_layers"])
    heads = int(config.get("num_attention_heads") or 1)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    size = int(config.get("head_dim") or d // heads)
    weights, queries, kept = d * size * (2 * heads + 2 * kv_heads), heads * size, 2 * kv_heads * size
    if config.get("kv_lora_rank"):
        weights, queries, kept = _latent_attention(config, d, heads)
    sparse, experts, chosen = _experts(config, d, depth)
    # Config files leave out what equals their class's default: tied in these families, not in the others.
    usual = str(config.get("model_type", "")).startswith(("gemma", "cohere"))
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    found: dict[str, float] = {
        "hidden": d,
        "layers": depth,
        "vocab": int(config["vocab_size"]),
        "queries": queries,
        "kv": kept,
        "attention": weights,
        "mlp": 3 * d * int(config.get("intermediate_size") or 4 * d),
        "sparse": sparse,
        "experts": experts,
        "chosen": chosen,
        "copies": 1 if config.get("tie_word_embeddings", usual) else 2,
        "width": NUMBER_BYTES.get(dtype, 2),
    }
    found["body"] = body_weights(found, experts).value
    found["active"] = body_weights(found, chosen).value
    return found | {"parameters": target_parameters(found).value}


def _latent_attention(config: Mapping[str, Any], d: int, heads: int) -> tuple[int, int, int]:
    """(weights, query width, numbers kept for a token) of a layer with compressed keys and values."""
    rank, rope = int(config["kv_lora_rank"]), int(config["qk_rope_head_dim"])
    turned, values = int(config["qk_nope_head_dim"]) + rope, int(config["v_head_dim"])
    low = config.get("q_lora_rank")
    queries = d * heads * turned if not low else int(low) * (d + heads * turned)
    pair = d * (rank + rope) + rank * heads * (turned - rope + values)
    return queries + pair + heads * values * d, heads * turned, heads * (turned + values)


def _experts(config: Mapping[str, Any], d: int, depth: int) -> tuple[int, int, int]:
    """(layers with experts, weights of one's MLP, those that a token passes); zeros for a dense model."""
    keys = ("num_experts", "num_local_experts", "n_routed_experts")
    count = next((int(config[k]) for k in keys if config.get(k)), 0)
    if not count:
        return 0, 0, 0
    chosen = int(config.get("num_experts_per_tok") or config.get("top_k_experts") or 1)
    one = 3 * d * int(config.get("moe_intermediate_size") or config["intermediate_size"])
    shared = int(config.get("n_shared_experts") or 0) * one
    shared += 3 * d * int(config.get("shared_expert_intermediate_size") or 0)
    first, every = int(config.get("first_k_dense_replace") or 0), int(config.get("decoder_sparse_step") or 1)
    dense = set(config.get("mlp_only_layers") or ()) | set(range(first))
    sparse = sum(1 for i in range(depth) if i not in dense and (i + 1) % every == 0)
    router = count * d
    return sparse, router + shared + count * one, router + shared + chosen * one


def draft_dimensions(spec: DraftSpec, own: int, precision: str) -> dict[str, float]:
    """The named numbers of a draft with `own` parameters, trained in `precision`."""
    shape, m = spec.shape, len(spec.target_layer_ids)
    queries, kv = shape.heads * shape.head_dim, 2 * shape.kv_heads * shape.head_dim
    parallel = ALGORITHMS[spec.algorithm].parallel
    # An unrolled draft's attention reads a token's embedding besides its hidden state.
    read = shape.hidden * (1 if parallel else 2)
    row_weights = read * queries + queries * shape.hidden + 3 * shape.hidden * shape.intermediate
    kv_weights = read * kv // (2 if shape.value_is_key else 1)
    own_vocab, fc = spec.draft_vocab_size or spec.vocab_size, m * shape.hidden**2
    markov = spec.markov_rank * (spec.vocab_size + own_vocab)
    layers, rank = spec.num_layers * (row_weights + kv_weights), spec.markov_rank
    gates = {"gated": (shape.hidden + rank) * rank, "rnn": (shape.hidden + 2 * rank) * 3 * rank}
    return {
        "hidden": shape.hidden,
        "vocab": spec.vocab_size,
        "parallel": parallel,
        "draft_layers": spec.num_layers,
        "block": spec.block,
        "feature_layers": m,
        "rank": spec.markov_rank,
        "own": own,
        "own_vocab": own_vocab,
        "draft_width": NUMBER_BYTES[precision],
        "draft_queries": queries,
        "draft_kv": kv,
        "draft_mlp": shape.intermediate,
        "draft_heads": shape.heads,
        "fc": fc,
        "row_weights": row_weights,
        "kv_weights": kv_weights,
        "matrices": fc + layers + (gates.get(spec.markov_head, 0) if rank else 0),
        "small": own - fc - layers - markov,
    }
