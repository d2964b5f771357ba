"""`deepspec quickstart`: everything once, on the pocket target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepspec.cli.common import Json, print_json, print_results
from deepspec.files import check_writable


def quickstart(
    fast: Annotated[
        bool, typer.Option("--fast", help="Run all of it on little data, in about three minutes.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for runs, results and the report.")] = Path(
        "runs/quickstart"
    ),
    as_json: Json = False,
) -> None:
    """See all of it on a small model: train, measure and report.

    Three drafts are trained for the target `pocket`, which ships with deepspec, and measured.

    \b
    Example:
      deepspec quickstart --fast
    """
    check_writable(out, folder=True)
    from deepspec.demo import quickstart as run

    report, results = run(out, fast=fast)
    if as_json:
        print_json({"report": str(report), "results": results})
        return
    print_results(results)
    typer.echo(f"report: {report}")
