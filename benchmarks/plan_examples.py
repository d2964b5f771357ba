"""The examples of docs/plan.md, as `deepspec plan` prints them, beside a disk with 500 GB free.

python benchmarks/plan_examples.py            rewrite the examples in docs/plan.md
"""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from deepspec.cli.plan import (
    needs_table,
    refusal,
    section_tables,
    target_facts,
    training_counts,
)
from deepspec.config import load_recipe
from deepspec.cost import MACHINES, Choices, cheapest_change, make_plan

PAGE = Path(__file__).parents[1] / "docs" / "plan.md"
EXAMPLES = (
    ("pocket-dspark", "laptop-cpu", "online"),
    ("dspark/qwen3-4b", "h100", "cache"),
    ("dspark/qwen3-4b", "rtx4090", "online"),
)
DISK = 500e9


def marks(name: str, machine: str) -> tuple[str, str]:
    return f"<!-- {name} on {machine}: begin -->\n", f"<!-- {name} on {machine}: end -->\n"


def example(name: str, machine: str, features: str) -> str:
    """A plan as the terminal shows it, with its refusal where it does not fit."""
    recipe = load_recipe(name)
    config, tokenizer, _ = target_facts(recipe.target)
    counts = training_counts(recipe, tokenizer, None, None, None, None)
    choices = Choices.answering("process", None, features=features, free_disk=DISK)
    plan = make_plan(recipe, config, counts, MACHINES[machine], choices)
    shown = io.StringIO()
    console = Console(file=shown, width=100, highlight=False)
    console.print(*section_tables(plan.sections, False), needs_table(plan.needs))
    lines = [*shown.getvalue().splitlines(), *(f"note: {each}" for each in plan.notes)]
    if not plan.fits:
        change = cheapest_change(plan, config, counts)
        refused = refusal(f"{plan.recipe.name} on {plan.machine.name}", plan.needs, change)
        lines += f"error: {refused}".splitlines()
    words = f"deepspec plan {name} --machine {machine}" + (" --features cache" if features == "cache" else "")
    text = "\n".join(line.rstrip() for line in [f"$ {words}", *lines])
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return f"```\n{text}\n```\n"


def main() -> None:
    page = PAGE.read_text("utf-8")
    for name, machine, features in EXAMPLES:
        begin, end = marks(name, machine)
        before, rest = page.split(begin)
        page = before + begin + example(name, machine, features) + end + rest.split(end)[1]
    PAGE.write_text(page, "utf-8")


if __name__ == "__main__":
    main()
