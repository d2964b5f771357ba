"""What training a draft takes: parameters, bytes and floating-point operations, each formula once.

Pure arithmetic over dimensions: nothing is loaded, nothing is measured. A `Figure` is computed from the text
of its formula, so that what is printed beside a number is what gave it.

d hidden width, m feature layers, V vocabulary, K rows of the draft's head, r Markov rank, S tokens of a
sequence, A anchors, γ slots (Eagle-3: unroll steps).
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deepspec.drafts.spec import DraftSpec

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "bf16": 2, "fp8": 1, "int8": 1}
SCALE_BYTES = 4
"""Of one float32 scale, per token and vector, beside a vector in fp8 or int8."""
ID_BYTES = 6
"""Per token of a cache, beside its vectors: the token's id and its masks."""
ROW_BYTES = 48
"""Host memory per token of the training rows: two list entries and an integer object."""
CHUNK = 24 * 2**20
"""Bytes of one of the loss's chunk-wide tensors (`losses.default_chunk_rows`)."""


# ── figures ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Figure:
    """A value, its unit, and the formula that gave it: in names, and with the numbers put in."""

    value: float
    unit: str
    formula: str
    numbers: str

    def __float__(self) -> float:
        return float(self.value)

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        return {"value": self.value, "unit": self.unit, "formula": f"{self.formula} = {self.numbers}"}


_OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_FUNCTIONS: dict[str, Callable[..., float]] = {"min": min, "max": max, "ceil": math.ceil}


def figure(unit: str, formula: str, **given: float | Figure) -> Figure:
    """The figure of a formula: + - * /, min, max and ceil over the names given.

    Raises KeyError for a name that was not given: a formula and its numbers cannot part.
    """
    names = {name: float(value) for name, value in given.items()}
    value = _evaluate(ast.parse(formula, mode="eval").body, names)
    words = re.sub(r"[A-Za-z_]\w*", lambda w: w[0] if w[0] in _FUNCTIONS else number(names[w[0]]), formula)
    return Figure(value, unit, formula.replace("*", "×"), words.replace("*", "×"))


def _evaluate(node: ast.expr, names: Mapping[str, float]) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.Name):
        return names[node.id]
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_evaluate(node.left, names), _evaluate(node.right, names))
    assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name), ast.unparse(node)
    return _FUNCTIONS[node.func.id](*(_evaluate(argument, names) for argument in node.args))


def number(value: float) -> str:
    """As short as it can be read: whole numbers in full up to nine digits, the rest with four digits."""
    if float(value).is_integer() and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:.4g}"


# ── the target ────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Dimensions:
    """A target's size, from its config alone.

    mixing, mlp, routed, chosen: matrix weights of a layer's attention, of a dense MLP, of a mixture of
    experts, and of those experts that a token passes. sparse: layers with a mixture. queries: query heads ×
    head width. kv: numbers kept by token and layer. copies: 1 where embedding and head are one.
    """

    hidden: int
    layers: int
    vocab: int
    queries: int
    kv: int
    mixing: int
    mlp: int
    sparse: int
    routed: int
    chosen: int
    copies: int
    dtype: str

    @property
    def body(self) -> int:
        """Matrix weights of the layers."""
        return int(body_weights(self, self.routed).value)

    @property
    def active(self) -> int:
        """Those that a token passes."""
        return int(body_weights(self, self.chosen).value)

    @property
    def total(self) -> int:
        """All parameters."""
        return int(target_parameters(self).value)


def body_weights(dims: Dimensions, experts: int) -> Figure:
    """Matrix weights of the layers; experts: of a mixture, all of them or those that a token passes."""
    return figure(
        "parameters",
        "layers * attention + (layers - sparse) * mlp + sparse * experts",
        layers=dims.layers,
        attention=dims.mixing,
        sparse=dims.sparse,
        mlp=dims.mlp,
        experts=experts,
    )


def target_parameters(dims: Dimensions) -> Figure:
    """Layers, two norms in each and one at the end, embedding and head."""
    return figure(
        "parameters",
        "body + (2 * layers + 1) * hidden + copies * vocab * hidden",
        body=body_weights(dims, dims.routed),
        layers=dims.layers,
        hidden=dims.hidden,
        copies=dims.copies,
        vocab=dims.vocab,
    )


def draft_parameters(spec: DraftSpec, own: int) -> Figure:
    """The draft's own; `small`: its norms and its confidence head, what is left of `own`."""
    rest, pair = layer_weights(spec)
    fc = len(spec.target_layer_ids) * spec.shape.hidden**2
    markov = spec.markov_rank * (spec.vocab_size + (spec.draft_vocab_size or spec.vocab_size))
    return figure(
        "parameters",
        "fc + layers * weights + markov + small",
        fc=fc,
        layers=spec.num_layers,
        weights=rest + pair,
        markov=markov,
        small=own - fc - spec.num_layers * (rest + pair) - markov,
    )


def dimensions(config: Mapping[str, Any]) -> Dimensions:
    """Of a target's raw text config. Layers are counted as softmax attention (or DeepSeek's latent attention)
    with a gated MLP or routed experts; what else a family has is small, or is not counted."""
    d, depth = int(config["hidden_size"]), int(config["num_hidden_layers"])
    heads = int(config.get("num_attention_heads") or 1)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    size = int(config.get("head_dim") or d // heads)
    weights, queries, kept = d * size * (2 * heads + 2 * kv_heads), heads * size, 2 * kv_heads * size
    if config.get("kv_lora_rank"):
        weights, queries, kept = _latent_attention(config, d, heads)
    sparse, routed, chosen = _experts(config, d, depth)
    # Config files leave out what equals their class's default: tied in these families, not in the others.
    usual = str(config.get("model_type", "")).startswith(("gemma", "cohere"))
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return Dimensions(
        hidden=d,
        layers=depth,
        vocab=int(config["vocab_size"]),
        queries=queries,
        kv=kept,
        mixing=weights,
        mlp=3 * d * int(config.get("intermediate_size") or 4 * d),
        sparse=sparse,
        routed=routed,
        chosen=chosen,
        copies=1 if config.get("tie_word_embeddings", usual) else 2,
        dtype=dtype if dtype in BYTES else "bfloat16",
    )


def _latent_attention(config: Mapping[str, Any], d: int, heads: int) -> tuple[int, int, int]:
    """(weights, query width, numbers kept per token) of a layer with compressed keys and values."""
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


# ── bytes on disk ─────────────────────────────────────────────────────────────────────────────────────


def cache_bytes_per_token(
    hidden: int,
    layers: int,
    dtype: str = "bf16",
    *,
    features_share: float = 1.0,
    last_share: float = 1.0,
) -> Figure:
    """Bytes that a feature cache takes for one token.

    hidden: d. layers: m feature layers; the last hidden state is one vector more. dtype: bf16, or fp8 or
    int8 with a float32 scale per token and vector. features_share, last_share: of the positions whose feature
    vectors, and whose last hidden state, are stored.
    """
    return figure(
        "bytes",
        "(width * hidden + scale) * (layers * features_share + last_share) + ids",
        width=BYTES[dtype],
        hidden=hidden,
        scale=SCALE_BYTES if dtype in ("fp8", "int8") else 0,
        layers=layers,
        features_share=features_share,
        last_share=last_share,
        ids=ID_BYTES,
    )


def cache_bytes(
    tokens: float,
    hidden: int,
    layers: int,
    dtype: str = "bf16",
    *,
    features_share: float = 1.0,
    last_share: float = 1.0,
) -> Figure:
    """Bytes of a feature cache of `tokens` tokens; the rest as for `cache_bytes_per_token`."""
    shares = {"features_share": features_share, "last_share": last_share}
    each = cache_bytes_per_token(hidden, layers, dtype, **shares)
    return figure("bytes", "tokens * bytes_per_token", tokens=tokens, bytes_per_token=each)


def read_share(algorithm: str, supervised_share: float, *, teacher: bool = True) -> float:
    """Share of the positions whose last hidden state the loss reads. Features are context, read everywhere.

    A teacher is read at p − 1 of each supervised p (Eagle-3: up to p + 1), as many positions as are
    supervised; without a teacher (DFlash) none is.
    """
    return min(supervised_share, 1.0) if algorithm == "eagle3" or teacher else 0.0


# ── bytes in memory ───────────────────────────────────────────────────────────────────────────────────


def state_bytes_per_parameter(precision: str, states: str = "float32") -> float:
    """Of a draft in training. bfloat16: weight and gradient, their float32 masters, two moments; float32: the
    weight is its own master. A moment in 8 bits has a float32 scale for every 256."""
    moments = 2 * 4 if states == "float32" else 2 * (1 + 4 / 256)
    return (2 + 2 + 4 + 4 if precision == "bfloat16" else 4 + 4) + moments


def activation_bytes(spec: DraftSpec, precision: str, sequences: int, length: int, anchors: int) -> Figure:
    """What the draft's forward pass keeps for its backward pass, of one micro-batch.

    Counted in the layers' code. A norm keeps its input and its normalised input in float32 (`norm`), a
    projection its input, attention its queries, keys and values, these spread over the query heads, the MLP
    four vectors of its width. A block draft keeps its mask once for each layer. Eagle-3 keeps the scores of
    every step after the first: softmax in float32, and a copy in the draft's own format (`score`). Fused
    kernels keep less.
    """
    shape, size = spec.shape, BYTES[precision]
    given: dict[str, float] = {
        "sequences": sequences,
        "length": length,
        "norm": 4,
        "width": size,
        "hidden": shape.hidden,
        "queries": shape.heads * shape.head_dim,
        "kv": shape.kv_heads * shape.head_dim,
        "mlp": shape.intermediate,
        "slots": spec.block,
    }
    if spec.algorithm == "eagle3":
        return figure(
            "bytes",
            "sequences * length * slots * (norm * (8 * hidden + 2 * queries + 2 * kv)"
            " + width * (4 * hidden + 6 * queries + 4 * mlp)"
            " + score * heads * (length + slots / 2) * (slots - 1) / slots)",
            **given,
            heads=shape.heads,
            score=4 if size == 4 else 4 + size,
        )
    return figure(
        "bytes",
        "sequences * (anchors * slots * (layers * (norm * (4 * hidden + 2 * queries + 2 * kv)"
        " + width * (2 * hidden + 5 * queries + 4 * mlp + length + anchors * slots))"
        " + norm * 2 * hidden + width * hidden)"
        " + length * (layers * (norm * 2 * kv + width * 2 * queries)"
        " + norm * 2 * hidden + width * hidden))",
        **given,
        layers=spec.num_layers,
        anchors=anchors,
    )


def passing_bytes(spec: DraftSpec, precision: str, sequences: int, length: int) -> Figure:
    """Eagle-3's scores of one step, written out several times between product and softmax; block drafts leave
    theirs to a fused kernel."""
    return figure(
        "bytes",
        "sequences * heads * length * length * (2 * width + 2 * norm)",
        sequences=sequences if spec.algorithm == "eagle3" else 0,
        heads=spec.shape.heads,
        length=length,
        width=BYTES[precision],
        norm=4,
    )


def head_bytes(spec: DraftSpec, rows: float) -> Figure:
    """What the loss holds beside the rows: chunk-wide tensors, gradients of hidden rows and of W₂."""
    return figure(
        "bytes",
        "tensors * chunk + rows * 4 * (2 * hidden + rank) + 8 * vocab * rank",
        tensors=6,
        chunk=CHUNK,
        rows=rows,
        hidden=spec.shape.hidden,
        rank=spec.markov_rank,
        vocab=spec.draft_vocab_size or spec.vocab_size,
    )


def slot_bytes(dims: Dimensions, spec: DraftSpec | None, rows: int, length: float) -> Figure:
    """Keys and values of `rows` sequences; a store that grows may hold up to twice what is used."""
    shape = None if spec is None else spec.shape
    return figure(
        "bytes",
        "2 * rows * length * width * (layers * kv + draft_layers * draft_kv)",
        rows=rows,
        length=length,
        width=BYTES[dims.dtype],
        layers=dims.layers,
        kv=dims.kv,
        draft_layers=0 if spec is None else spec.num_layers,
        draft_kv=0 if shape is None else 2 * shape.kv_heads * shape.head_dim,
    )


# ── floating-point operations ─────────────────────────────────────────────────────────────────────────
# 2 per weight and row forwards, 4 more backwards. Scores and their use are counted whole, also where a kernel
# skips what a mask hides: 4 per query width and key forwards, 8 more backwards.


def forward_flops(dims: Dimensions, tokens: float, reach: float, *, logits: float = 0.0) -> Figure:
    """The target's forward pass. reach: keys that a token meets, on average over tokens. logits: rows that
    pass the head."""
    return figure(
        "FLOPs",
        "tokens * (2 * active + 4 * layers * queries * keys) + 2 * logits * vocab * hidden",
        tokens=tokens,
        active=dims.active,
        layers=dims.layers,
        queries=dims.queries,
        keys=reach,
        logits=logits,
        vocab=dims.vocab,
        hidden=dims.hidden,
    )


def layer_weights(spec: DraftSpec) -> tuple[int, int]:
    """Matrix weights of one draft layer: (those that every row passes, those of keys and values)."""
    shape = spec.shape
    inner, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    wide = shape.hidden * (2 if spec.algorithm == "eagle3" else 1)
    pair = wide * kv * (1 if shape.value_is_key else 2)
    return wide * inner + inner * shape.hidden + 3 * shape.hidden * shape.intermediate, pair


def draft_flops(spec: DraftSpec, sequences: float, length: float, reach: float, anchors: float) -> Figure:
    """The draft's layers, forwards and backwards; its head is `head_flops`.

    `fc` needs no gradient of the features it reads: 4 a weight instead of 6. A block draft's context passes
    `fc` and the key and value weights only; its slots meet the context and all slots of the sequence.
    reach: the length that a token meets, on average over tokens.
    """
    shape = spec.shape
    rest, pair = layer_weights(spec)
    given: dict[str, float] = {
        "sequences": sequences,
        "length": length,
        "layers": spec.num_layers,
        "rest": rest,
        "pair": pair,
        "slots": spec.block,
        "queries": shape.heads * shape.head_dim,
        "fc": len(spec.target_layer_ids) * shape.hidden**2,
        "reach": reach,
    }
    if spec.algorithm == "eagle3":
        return figure(
            "FLOPs",
            "sequences * length * (4 * fc + slots * (6 * (rest + pair) + 12 * queries * reach))",
            **{k: v for k, v in given.items() if k != "layers"},
        )
    return figure(
        "FLOPs",
        "sequences * (length * (4 * fc + layers * 6 * pair) + anchors * slots * layers"
        " * (6 * (rest + pair) + 12 * queries * (reach + anchors * slots)))",
        **given,
        anchors=anchors,
    )


def head_flops(spec: DraftSpec, rows: float, taught: float) -> Figure:
    """The draft's head forwards and back to its rows (the weight is frozen), W₂ with its gradient, and the
    target's head on a teacher's rows. taught: share of the rows that have a teacher."""
    return figure(
        "FLOPs",
        "rows * (4 * own_vocab * hidden + 6 * own_vocab * rank + taught * 2 * vocab * hidden)",
        rows=rows,
        own_vocab=spec.draft_vocab_size or spec.vocab_size,
        vocab=spec.vocab_size,
        hidden=spec.shape.hidden,
        rank=spec.markov_rank,
        taught=taught,
    )


def slots_that_count(supervised: float, slots: int) -> float:
    """Mean number of a block's slots whose labels are inside the answer, for `supervised` tokens of it."""
    candidates = max(supervised - 1.0, 1.0)
    return slots - slots * (slots - 1) / (2 * max(candidates, slots))
