"""The examples of docs/plan.md, as `deepspec plan` prints them for a disk with 500 GB free.

python benchmarks/plan_examples.py            rewrite the examples in docs/plan.md
"""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from deepspec.cli.plan import needs_table, refusal, section_tables
from deepspec.config import load_recipe
from deepspec.cost.fit import cheapest_change
from deepspec.cost.plan import make_plan
from deepspec.planning import prepare

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
    """A plan as the terminal shows it, with its refusal if it does not fit."""
    inputs, source = prepare(load_recipe(name), machine, features=features, free_disk=DISK)
    plan = make_plan(inputs, source)
    shown = io.StringIO()
    console = Console(file=shown, width=100, highlight=False)
    console.print(*section_tables(plan.sections, False), needs_table(plan.needs))
    lines = [*shown.getvalue().splitlines(), *(f"note: {each}" for each in plan.notes)]
    if not plan.fits:
        lines += f"error: {refusal(plan, cheapest_change(inputs))}".splitlines()
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
