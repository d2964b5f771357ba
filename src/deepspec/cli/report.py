"""`deepspec report`: results files as one HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepspec.cli.common import (
    read_results,
)
from deepspec.errors import DataError, UserError
from deepspec.files import check_writable

if TYPE_CHECKING:
    pass


def report(
    files: Annotated[list[Path], typer.Argument(metavar="RESULTS.json", help="Written by deepspec eval.")],
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metrics", metavar="NAME=FILE", help="A draft's metrics.jsonl; may be repeated."),
    ] = None,
    out: Annotated[Path, typer.Option("--out")] = Path("report.html"),
) -> None:
    """Results files as one HTML page that opens from disk.

    \b
    Example:
      deepspec report eval-t0.json eval-t1.json --metrics dspark=runs/pocket-dspark/metrics.jsonl
    """
    check_writable(out)
    results = [r for file in files for r in read_results(file)]
    training = dict(_read_curve(text) for text in metrics or [])
    from deepspec.report.page import write_report

    typer.echo(str(write_report(out, results, training)))


def _read_curve(text: str) -> tuple[str, list[dict[str, Any]]]:
    """NAME=FILE -> the name and the rows of the metrics file (a run folder will do)."""
    name, equals, where = text.partition("=")
    path = Path(where) / "metrics.jsonl" if Path(where).is_dir() else Path(where)
    if not (name and equals and path.is_file()):
        raise UserError(
            f"--metrics {text}: no such metrics file" if equals else f"--metrics {text}: no name given",
            next_step="write NAME=FILE, for example dspark=runs/pocket-dspark/metrics.jsonl",
        )
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"malformed JSON: {error}", where=f"{path}:{number}") from error
    return name, rows
