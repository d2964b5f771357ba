"""`deepspec report`: results files as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deepspec.errors import UserError
from deepspec.files import check_writable
from deepspec.report.results import read_metrics, read_results


def report(
    files: Annotated[list[Path], typer.Argument(metavar="RESULTS.json", help="Written by deepspec eval.")],
    metrics: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="A run's metrics.jsonl, for curves; may be repeated."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The page's file.")] = Path("report.html"),
) -> None:
    """Write results files as one HTML page that opens from disk.

    \b
    Example:
      deepspec report eval-t0.json eval-t1.json --metrics dspark=runs/pocket-dspark/metrics.jsonl
    """
    check_writable(out)
    results = [r for file in files for r in read_results(file)]
    training = dict(_named_metrics(text) for text in metrics or [])
    from deepspec.report.page import write_report

    typer.echo(str(write_report(out, results, training)))


def _named_metrics(text: str) -> tuple[str, list[dict[str, Any]]]:
    """NAME=FILE -> the name and the rows of the metrics file; a run's folder stands for its file."""
    name, equals, where = text.partition("=")
    path = Path(where) / "metrics.jsonl" if Path(where).is_dir() else Path(where)
    if not (name and equals and path.is_file()):
        raise UserError(
            f"--metrics {text}: there is no such file" if equals else f"--metrics {text}: it has no name",
            next_step="write NAME=FILE, for example dspark=runs/pocket-dspark/metrics.jsonl",
        )
    return name, read_metrics(path)
