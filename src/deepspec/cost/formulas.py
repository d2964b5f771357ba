"""What training a draft takes in bytes and operations, every formula once: a line of Python over named
numbers (`dimensions.py` has the names of the target and the draft).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deepspec.features.formats import STORED_BYTES, TOKEN_BYTES, scale_bytes
from deepspec.maths.chunking import cpu_block_rows, default_chunk_rows

FUNCTIONS = {"min": min, "max": max, "ceil": math.ceil}
CPU_THREADS = 2
"""Of a planned processor. The loss works in 1.5 MB more for each further one."""


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


Names = dict[str, float]


def figure(unit: str, formula: str, names: Names | None = None, /, **more: float | Figure) -> Figure:
    """The figure of a formula: + - * /, min, max and ceil over `names` and `more`, which comes first.

    Python evaluates the text: formulas are literals of this package and never come from a user.
    """
    given = {name: float(value) for name, value in {**(names or {}), **more}.items()}
    numbers = re.sub(r"[A-Za-z_]\w*", lambda w: w[0] if w[0] in FUNCTIONS else number(given[w[0]]), formula)
    value = eval(formula, {"__builtins__": {}, **FUNCTIONS}, given)
    return Figure(value, unit, formula.replace("*", "×"), numbers.replace("*", "×"))


def total(figures: Mapping[str, Figure]) -> Figure:
    """The sum of figures of one unit, by their names."""
    unit = next(iter(figures.values())).unit
    numbers = " + ".join(number(each.value) for each in figures.values())
    return Figure(sum(each.value for each in figures.values()), unit, " + ".join(figures), numbers)


def number(value: float) -> str:
    """As short as it can be read: whole numbers in full up to nine digits, the rest with four digits."""
    if float(value).is_integer() and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:.4g}"


def body_weights(target: Names, experts: float) -> Figure:
    """Matrix weights of the layers. experts: weights of a mixture, all or those that a token passes."""
    formula = "layers * attention + (layers - sparse) * mlp + sparse * experts"
    return figure("parameters", formula, target, experts=experts)


def target_parameters(target: Names) -> Figure:
    """Layers, two norms in each and one at the end, embedding and head."""
    return figure("parameters", "body + (2 * layers + 1) * hidden + copies * vocab * hidden", target)


def draft_parameters(draft: Names) -> Figure:
    """The draft's own parameters; embedding and head are the target's."""
    formula = "fc + draft_layers * (row_weights + kv_weights) + rank * (vocab + own_vocab) + small"
    return figure("parameters", formula, draft)


def cache_bytes_per_token(
    hidden: int, layers: int, store: str = "bf16", *, features_share: float = 1.0, last_share: float = 1.0
) -> Figure:
    """Bytes that a feature cache takes for one token.

    hidden: d. layers: m feature layers; the last hidden state is one vector more. store: bf16, or fp8 or
    int8 with a float32 scale for each vector. features_share, last_share: share of the positions whose
    feature vectors, and whose last hidden state, are stored.
    """
    return figure(
        "bytes",
        "(number * hidden + scale) * (layers * features_share + last_share) + token",
        number=STORED_BYTES[store],
        hidden=hidden,
        scale=scale_bytes(store),
        layers=layers,
        features_share=features_share,
        last_share=last_share,
        token=TOKEN_BYTES,
    )


def moment_bytes(states: str) -> float:
    """Bytes of AdamW's two moments of a parameter: float32, or 8 bits with a float32 scale for every 256."""
    return 2 * 4 if states == "float32" else 2 * (1 + 4 / 256)


MOMENTUM_BYTES = 4
"""Of a parameter that Muon steps: its momentum in float32."""


OFFLOADED_BYTES = 2 * 4 + 2 * 4 * 1.5
"""Of the host's memory for a parameter whose optimiser is offloaded: two moments, and master and gradient in
pinned pages, which torch takes in powers of two (half more than is needed, for the published drafts)."""


def state_bytes_per_parameter(precision: str, states: str = "float32", offloaded: bool = False) -> float:
    """Bytes of a draft in training for one parameter: its weight, in bfloat16 also the float32 master (a
    float32 weight is its own); the float32 gradient, to which narrower ones are added one by one, so that
    only one of these is there at a time; the optimiser's two moments. offloaded: without what is then in
    the host's memory."""
    weight, master = (2, 4) if precision == "bfloat16" else (4, 0)
    return weight + 4 + (0 if offloaded else master + moment_bytes(states))


def activation_bytes(
    draft: Names, sequences: float, length: float, anchors: float, fused: bool = False
) -> Figure:
    """Bytes that the draft's forward pass keeps for its backward pass, for one micro-batch.

    Counted in the layers' code. A norm keeps its input and its normalised input in float32 (4 bytes), a
    projection its input, attention its queries, keys, values, output and the logarithms of its sums (4 bytes
    a head), the MLP four vectors of its width. fused: kernels that compute again what is between their inputs
    and outputs, so that a norm keeps only its input, and the MLP three vectors. The backward pass of an
    unrolled step's attention then works with three float32 vectors of its queries' width.
    """
    if fused and not draft["parallel"]:
        formula = (
            "sequences * length * (3 * 4 * draft_queries + block * (4 * draft_heads"
            " + draft_width * (7 * hidden + 3 * draft_queries + 3 * draft_kv + 3 * draft_mlp)))"
        )
    elif fused:
        formula = (
            "sequences * (anchors * block * (draft_layers * (3 * 4 * draft_heads"
            " + draft_width * (4 * hidden + 3 * draft_queries + 3 * draft_kv + 3 * draft_mlp))"
            " + draft_width * 2 * hidden)"
            " + length * draft_width * (draft_layers * 3 * draft_kv + 2 * hidden))"
        )
    elif not draft["parallel"]:
        formula = (
            "sequences * length * block * (4 * (8 * hidden + 2 * draft_queries + draft_kv + draft_heads)"
            " + draft_width * (4 * hidden + 3 * draft_queries + draft_kv + 4 * draft_mlp))"
        )
    else:
        formula = (
            "sequences * (anchors * block * (draft_layers"
            " * (4 * (4 * hidden + 2 * draft_queries + draft_kv + draft_heads)"
            " + draft_width * (2 * hidden + 3 * draft_queries + draft_kv + 4 * draft_mlp))"
            " + 4 * 2 * hidden + draft_width * hidden)"
            " + length * (draft_layers * (4 + draft_width) * draft_kv"
            " + 4 * 2 * hidden + draft_width * hidden))"
        )
    return figure("bytes", formula, draft, sequences=sequences, length=length, anchors=anchors)


def head_bytes(
    draft: Names, loss_rows: float, teachers: float, accelerated: bool, fused: bool = False
) -> Figure:
    """Bytes that the loss holds: a chunk's logits of draft and teacher (also over the whole vocabulary, if
    the draft's is reduced); three tensors to work in, as wide on an accelerator, blocks of a chunk on a CPU,
    or, if the loss is fused, the gradient of the logits in the draft's own format; the rows that pass the
    head, of the hidden states and of the Markov head, with their gradients; the teachers' rows; W₂'s
    gradient in float32."""
    formula = (
        "own_vocab * (4 * 2 * chunk + worked * block_rows) + 4 * full * chunk"
        " + loss_rows * draft_width * 2 * (hidden + rank)"
        " + teachers * width * hidden + 4 * own_vocab * rank"
    )
    vocab, own = int(draft["vocab"]), int(draft["own_vocab"])
    chunk = min(default_chunk_rows(vocab, accelerated), loss_rows)
    return figure(
        "bytes",
        formula,
        draft,
        loss_rows=loss_rows,
        teachers=teachers,
        chunk=chunk,
        worked=int(draft["draft_width"]) if fused else 3 * 4,
        block_rows=chunk if accelerated else min(chunk, cpu_block_rows(own, CPU_THREADS)),
        full=vocab if own < vocab else 0,
    )


def slot_bytes(names: Names, sequences: float, context: float) -> Figure:
    """Bytes of keys and values of target and draft; a store that grows may hold up to twice what is used."""
    formula = "2 * sequences * context * width * (layers * kv + draft_layers * draft_kv)"
    return figure("bytes", formula, names, sequences=sequences, context=context)


# Floating-point operations: 2 for each weight and row forwards, 4 more backwards. Attention takes 4 for each
# query width and key forwards, and 10 more backwards, where scores are computed again. The target's scores
# are counted whole, also where a kernel skips what a mask hides.


def forward_flops(target: Names, tokens: float, keys: float, *, logits: float = 0.0) -> Figure:
    """Operations of the target's forward pass. keys: how many a token meets, on average over tokens. logits:
    rows that pass the head."""
    formula = "tokens * (2 * active + 4 * layers * queries * keys) + 2 * logits * vocab * hidden"
    return figure("FLOPs", formula, target, tokens=tokens, keys=keys, logits=logits)


def draft_flops(draft: Names, sequences: float, length: float, keys: float, anchors: float) -> Figure:
    """Operations of the draft's layers, forwards and backwards; its head is `head_flops`.

    `fc` needs no gradient of the features it reads: 4 a weight instead of 6. A block draft's context passes
    `fc` and the key and value weights only; its slots meet the context before their anchor and their block.
    keys: context positions that a query meets, on average.
    """
    if not draft["parallel"]:
        formula = (
            "sequences * length * (4 * fc"
            " + block * (6 * (row_weights + kv_weights) + 14 * draft_queries * keys))"
        )
    else:
        formula = (
            "sequences * (length * (4 * fc + draft_layers * 6 * kv_weights) + anchors * block * draft_layers"
            " * (6 * (row_weights + kv_weights) + 14 * draft_queries * (keys + block)))"
        )
    return figure("FLOPs", formula, draft, sequences=sequences, length=length, keys=keys, anchors=anchors)


def head_flops(draft: Names, loss_rows: float, teachers: float) -> Figure:
    """Operations of the draft's head forwards and back to its rows (the weight is frozen), of W₂ with its
    gradient, and of the target's head on the rows of the teachers: a teacher is computed once for all rows
    that learn from it."""
    formula = "loss_rows * (4 * own_vocab * hidden + 6 * own_vocab * rank) + teachers * 2 * vocab * hidden"
    return figure("FLOPs", formula, draft, loss_rows=loss_rows, teachers=teachers)


def slots_that_count(supervised: float, block: int) -> float:
    """Mean number of a block's slots whose labels are inside the answer, for `supervised` tokens of it."""
    candidates = max(supervised - 1.0, 1.0)
    return block - block * (block - 1) / (2 * max(candidates, block))
