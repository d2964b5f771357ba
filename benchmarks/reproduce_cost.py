"""The table of docs/reproduce.md: disk and GPU-hours behind each row of the published table, as `deepspec
plan` computes them from the shipped recipes and the targets' dimensions; no weights, no network.

    python benchmarks/reproduce_cost.py            rewrite the table in docs/reproduce.md
"""

from __future__ import annotations

from pathlib import Path

from deepspec.config import load_recipe
from deepspec.cost.dimensions import PUBLISHED_TARGETS
from deepspec.cost.formulas import cache_bytes_per_token
from deepspec.cost.inputs import Inputs, published_counts
from deepspec.cost.machines import MACHINES
from deepspec.cost.plan import Plan, make_plan
from deepspec.planning import describe
from recipe_parameters import BEGIN, END

PAGE = Path(__file__).parents[1] / "docs" / "reproduce.md"


def published_plan(recipe_name: str, engine: str = "process") -> Plan:
    """A published recipe on the published data set, on one H100; answered by `engine`."""
    recipe = load_recipe(recipe_name)
    config = PUBLISHED_TARGETS[recipe.target]
    return make_plan(Inputs(recipe, config, published_counts(), MACHINES["h100"], describe, engine=engine))


def table() -> str:
    """One row per published draft whose target's dimensions are known here."""
    heads = "recipe", "features, GPU-hours", "training, GPU-hours", "sum", "disk online", "disk of a cache"
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for target in ("qwen3-4b", "qwen3-8b", "qwen3-14b"):
        for algorithm in ("eagle3", "dflash", "dspark"):
            name = f"{algorithm}/{target}"
            plan = published_plan(name)
            found, names = plan.sections, plan.inputs.names
            spent = [found["time"][phase].value / 3600 for phase in ("features", "training")]
            figures = [f"{each:,.0f}" for each in (*spent, sum(spent))]
            each = cache_bytes_per_token(int(names["hidden"]), int(names["feature_layers"]))
            cache = names["tokens"] * each.value
            lines.append("| " + " | ".join([f"`{name}`", *figures, "0", f"{cache / 1e12:.0f} TB"]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1], "utf-8")


if __name__ == "__main__":
    main()
