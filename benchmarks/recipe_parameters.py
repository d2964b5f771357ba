"""The table of docs/recipes.md: what each shipped recipe's draft is made of, computed from the recipe and the
target's dimensions; no weights, no network.

    python benchmarks/recipe_parameters.py            rewrite the table in docs/recipes.md
    python benchmarks/recipe_parameters.py TARGET     print it for a target of yours: directory or Hub id
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from deepspec.build import draft_spec
from deepspec.config import load_recipe, recipe_names
from deepspec.inspection import parameters
from deepspec.target import TargetSpec

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
TARGETS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-4B": QWEN3
    | {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "Qwen/Qwen3-8B": QWEN3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "Qwen/Qwen3-14B": QWEN3
    | {
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
}
"""Dimensions of the published targets that are known here."""
STATE_BYTES = {"float32": 2 + 2 + 4 + 4 + 2 * 4, "8bit": 2 + 2 + 4 + 4 + 2 * (1 + 4 / 256)}
"""Per trained parameter, by `optim.states`: weight, gradient in bfloat16; master, its gradient in float32;
two moments in float32, or in a byte each with a float32 scale for every 256 (norms keep float32)."""


def row(recipe_name: str, name: str, config: dict[str, Any]) -> str:
    """One line of the table. name: of the target."""
    recipe = load_recipe(recipe_name, [f"target={name}"])
    # A block draft's mask token does not change its size.
    mask = None if recipe.algorithm == "eagle3" else recipe.draft.mask_token_id or 0
    spec = draft_spec(recipe, config, mask)
    own, shared = parameters(spec)
    cached = 2 * spec.num_layers * spec.shape.kv_heads * spec.shape.head_dim * 2
    layers = " ".join(map(str, spec.target_layer_ids))
    cells = [f"`{recipe_name}`", layers, f"{own:,}", f"{own + shared:,}", f"{2 * own / 1e9:.2f}"]
    training = STATE_BYTES[recipe.optim.states] * own / 1e9
    return "| " + " | ".join([*cells, f"{training:.1f}", f"{cached:,}"]) + " |"


def table(rows: list[str]) -> str:
    heads = "recipe", "feature layers", "own parameters", "with embedding and head", "GB it adds"
    heads = (*heads, "GB in training", "KV bytes per token")
    return "\n".join(["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *rows]) + "\n"


def published() -> str:
    """The rows whose targets' dimensions are known here."""
    names = [n for n in recipe_names() if "/" in n and not n.endswith("/generic")]
    targets = {n: load_recipe(n).target for n in names}
    return table([row(n, targets[n], TARGETS[targets[n]]) for n in names if targets[n] in TARGETS])


def main() -> None:
    if len(sys.argv) > 1:
        target = TargetSpec.from_pretrained(sys.argv[1])
        generic = [n for n in recipe_names() if n.endswith("/generic")]
        print(table([row(n, target.name, target.config) for n in generic]), end="")
        return
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + published() + END + rest.split(END)[1], "utf-8")


if __name__ == "__main__":
    main()
