"""`deepspec compare`: paired differences between results files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from deepspec.cli.common import Json, print_json, stdout, table_of
from deepspec.log import warn
from deepspec.report.results import MISSING, estimate, number, read_results


def compare(
    files: Annotated[list[Path], typer.Argument(metavar="RESULTS.json", help="Written by deepspec eval.")],
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Compare even if the files differ in their conditions.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compare the accepted lengths τ of drafts in results files.

    Every two drafts are compared on the prompts that both answered: the differences are paired by prompt and
    have 95% intervals. Files that were measured under other conditions are refused, with the reasons.

    \b
    Example:
      deepspec compare before.json after.json
    """
    results = [result for file in files for result in read_results(file)]
    from deepspec.report.compare import compare_results

    found = compare_results(results, allow_mismatch)
    for sentence in [*found["refusals"], *found["warnings"]]:
        warn(sentence)
    if as_json:
        print_json(found)
        return
    table = table_of("b - a", "prompts", "τ(a)", "τ(b)", "difference", "95% interval")
    for pair in found["comparisons"]:
        table.add_row(*_difference_cells(f"{pair['b']}\n  - {pair['a']}", pair))
        for domain, part in pair["domains"].items():
            table.add_row(*_difference_cells(f"    {domain}", part))
    stdout().print(table)
    left_out = max(pair["left_out"] for pair in found["comparisons"])
    if left_out:
        warn(f"up to {left_out} prompts are left out, because only one side has them")


def _difference_cells(name: str, part: Mapping[str, Any]) -> list[Text]:
    difference, interval = estimate(part["difference"])
    cells = [name, str(part["prompts"]), number(part["tau_a"]), number(part["tau_b"]), difference]
    return [Text(cell) for cell in [*cells, interval.strip("[]").replace(", ", " to ") or MISSING]]
