"""The table of docs/recipes.md: what each shipped recipe's draft is made of, computed from the recipe and the
target's dimensions; no weights, no network.

    python benchmarks/recipe_parameters.py            rewrite the table in docs/recipes.md
    python benchmarks/recipe_parameters.py TARGET     print it for a target of yours: directory or Hub id
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from deepspec.checkpoints.inspect import parameters
from deepspec.config import load_recipe
from deepspec.cost.dimensions import PUBLISHED_TARGETS as TARGETS
from deepspec.cost.formulas import state_bytes_per_parameter
from deepspec.planning import describe
from deepspec.recipe_files import recipe_names
from deepspec.targets import TargetSpec

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
ANY = ("/generic", "/small")
"""Recipes for any target."""
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


def row(recipe_name: str, name: str, config: dict[str, Any]) -> str:
    """One line of the table. name: of the target."""
    recipe = load_recipe(recipe_name, [f"target={name}"])
    spec, own = describe(recipe, config)
    shared = parameters(spec)[1]
    cached = 2 * spec.num_layers * spec.shape.kv_heads * spec.shape.head_dim * 2
    layers = " ".join(map(str, spec.target_layer_ids))
    state = state_bytes_per_parameter(recipe.precision, recipe.optim.states, recipe.offload_optimizer)
    cells = [f"`{recipe_name}`", layers, f"{own:,}", f"{own + shared:,}", f"{2 * own / 1e9:.2f}"]
    return "| " + " | ".join([*cells, f"{state * own / 1e9:.1f}", f"{cached:,}"]) + " |"


def table(rows: list[str]) -> str:
    heads = "recipe", "feature layers", "own parameters", "with embedding and head", "GB it adds"
    heads = (*heads, "GB in training", "KV bytes per token")
    return "\n".join(["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *rows]) + "\n"


def published() -> str:
    """The rows whose targets' dimensions are known here."""
    names = [n for n in recipe_names() if "/" in n and not n.endswith(ANY)]
    targets = {n: load_recipe(n).target for n in names}
    return table([row(n, targets[n], TARGETS[targets[n]]) for n in names if targets[n] in TARGETS])


def main() -> None:
    if len(sys.argv) > 1:
        target = TargetSpec.from_pretrained(sys.argv[1])
        names = [n for n in recipe_names() if n.endswith(ANY)]
        print(table([row(n, target.name, target.config) for n in names]), end="")
        return
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + published() + END + rest.split(END)[1], "utf-8")


if __name__ == "__main__":
    main()
