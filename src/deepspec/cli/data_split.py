"""`deepspec data split`: training, selection and test sets."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from deepspec.cli.common import (
    DropRepeats,
    Json,
    SkipBad,
    data_file,
    print_json,
    report_skipped,
    say_repeats,
    skipping,
)
from deepspec.files import check_writable


def split(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", parser=data_file, help="JSONL files, or pocket:train; read as one."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for train.jsonl, select.jsonl and test.jsonl.")],
    select: Annotated[float, typer.Option(help="Share of rows to choose the best checkpoint with.")] = 0.01,
    test: Annotated[float, typer.Option(help="Share of rows to report results on.")] = 0.04,
    drop_repeats: DropRepeats = False,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Divide conversations into train, select and test sets.

    No question is in two of them: the set of a row depends on its opening question alone. Copies, another
    order of the rows or another run therefore change nothing.

    \b
    Example:
      deepspec data split prompts.jsonl --out prompts
      deepspec data split shards/*.jsonl --out prompts
    """
    from deepspec.data.split import split as run

    skipped = skipping(skip_bad)
    check_writable(out, folder=True)
    done = run(files, out, select=select, test=test, drop_repeats=drop_repeats, skipped=skipped)
    report_skipped(skipped)
    if as_json:
        print_json({"out": str(out), **vars(done), "skipped": skipped.as_json()})
        return
    total = sum(done.rows.values())
    for name, rows in done.rows.items():
        typer.echo(f"{out / name}.jsonl: {rows:,} rows ({rows / total:.1%})")
    say_repeats(done.repeats, drop_repeats)
    words = ["deepspec", "data", "regenerate", str(out / "train.jsonl"), "--out", str(out / "answers.jsonl")]
    typer.echo(f"next: {shlex.join([*words, '--target', 'TARGET'])}")
