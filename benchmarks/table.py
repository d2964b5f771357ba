"""docs/benchmarks.md from benchmarks/results.yaml: one table per question.

python benchmarks/table.py             print the page
python benchmarks/table.py --write     rewrite docs/benchmarks.md
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

DATA = Path(__file__).parent / "results.yaml"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
OPENING = """# Benchmarks

Every figure on this page was measured on a CPU; nothing here was measured on a GPU yet. Brackets hold 95%
intervals over prompts. τ is the mean number of tokens that one round of drafting and checking yields, and T
is the temperature. "–" means that the run did not report the figure. The last column is the number of the
run, which is listed under the table. Runs before 2026-11-29 compare with a slower plain step (the log has its
figures), so their speed-ups are higher than the same drafts would have today.

`python benchmarks/table.py --write` generates this page from `benchmarks/results.yaml`. After a
measurement, add its command, date, hardware and figures there. What was tried and dropped is in the
[log](log.md). Feature caches and inference servers have their own tables in [features](features.md) and
[serving](serving.md).
"""


def questions() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(DATA.read_text("utf-8"))
    return found


def line(cells: list[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def section(entry: dict[str, Any]) -> Iterator[str]:
    """The lines of one question: its heading, notes, table, and numbered runs."""
    heads = [*entry["columns"], "run"]
    yield from ("", f"## {entry['question']}")
    for note in entry["notes"]:
        yield from ("", textwrap.fill(note, 118, break_on_hyphens=False))
    yield from ("", line(heads), "|" + "---|" * len(heads))
    for number, run in enumerate(entry["runs"], 1):
        for cells in run["rows"]:
            yield line([*cells, number])
    yield ""
    for number, run in enumerate(entry["runs"], 1):
        yield f"{number}. {run['date']}, {run['hardware']}: `{run['command']}`"


def page() -> str:
    return OPENING + "\n".join(text for entry in questions() for text in section(entry)) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), "utf-8")
    else:
        print(page(), end="")
