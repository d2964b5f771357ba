"""The table of docs/reproduce.md: tokens, disk and GPU-hours behind each row of the published table, computed
from the shipped recipes and the targets' dimensions; no weights, no network.

    python benchmarks/reproduce_cost.py            rewrite the table in docs/reproduce.md

Work is counted in floating-point operations: 2 per weight and token forwards, 4 more backwards. The frozen
target is only read forwards, and so is the teacher's head; gradients pass through the draft's head, whose
weight is frozen. Attention scores are left out (a few per cent at these lengths).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from deepspec.build import draft_spec
from deepspec.config import load_recipe
from deepspec.inspection import parameters
from recipe_parameters import BEGIN, END, TARGETS

PAGE = Path(__file__).parents[1] / "docs" / "reproduce.md"
ROWS = 1_300_000
TOKENS = 38e12 / (6 * 2560 * 2)
"""Of the training set: the published cache of Qwen3-4B, 38 TB, at six bfloat16 vectors of 2,560 a token."""
PEAK, SHARE = 989e12, 0.4
"""Dense bfloat16 operations per second of one H100, and the share of it that training is taken to reach."""


class Cost(NamedTuple):
    """Of one recipe: operations of features and of training over all epochs, bytes a cache would take."""

    features: float
    training: float
    cache: float


def body_weights(dims: dict[str, int]) -> int:
    """Matrix weights of a Qwen3 target's layers, embedding and head left out."""
    d, heads, kv, size = (
        dims[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    attention = d * size * (2 * heads + 2 * kv)
    return dims["num_hidden_layers"] * (attention + 3 * d * dims["intermediate_size"])


def cost(recipe_name: str) -> Cost:
    """What a published recipe takes."""
    recipe = load_recipe(recipe_name)
    dims = TARGETS[recipe.target]
    spec = draft_spec(recipe, dims, None if recipe.algorithm == "eagle3" else recipe.draft.mask_token_id or 0)
    own, _ = parameters(spec)
    own -= 2 * spec.vocab_size * spec.markov_rank  # looked up, and a head beside the head: counted below
    epochs = recipe.optim.epochs or 0
    if recipe.algorithm == "eagle3":
        rows = TOKENS * spec.block  # every position, every unrolled step
    else:
        rows = ROWS * min(recipe.num_anchors, TOKENS / ROWS) * spec.block
    head = spec.vocab_size * (dims["hidden_size"] + spec.markov_rank)
    # Through the draft's head forwards and back to the hidden rows; the teacher's, if there is one.
    taught = recipe.algorithm == "eagle3" or recipe.loss.l1 > 0
    teacher = 2 * spec.vocab_size * dims["hidden_size"] if taught else 0
    markov = 2 * spec.vocab_size * spec.markov_rank
    training = epochs * rows * (6 * own + 4 * head + markov + teacher)
    vectors = len(spec.target_layer_ids) + 1
    return Cost(
        epochs * TOKENS * 2 * body_weights(dims), training, TOKENS * vectors * 2 * dims["hidden_size"]
    )


def hours(operations: float) -> float:
    return operations / (PEAK * SHARE) / 3600


def table() -> str:
    """One row per published draft whose target's dimensions are known here."""
    heads = "recipe", "features, GPU-hours", "training, GPU-hours", "sum", "disk online", "disk of a cache"
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for target in ("qwen3-4b", "qwen3-8b", "qwen3-14b"):
        for algorithm in ("eagle3", "dflash", "dspark"):
            name = f"{algorithm}/{target}"
            found = cost(name)
            spent = hours(found.features), hours(found.training)
            figures = [f"{each:,.0f}" for each in (*spent, sum(spent))]
            lines.append(
                "| " + " | ".join([f"`{name}`", *figures, "0", f"{found.cache / 1e12:.0f} TB"]) + " |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1], "utf-8")


if __name__ == "__main__":
    main()
