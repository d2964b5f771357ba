"""`deepspec data download`: any data set as a file of conversations."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from deepspec.cli.common import (
    DropRepeats,
    Json,
    Seed,
    SkipBad,
    print_json,
    report_skipped,
    say_repeats,
    skipping,
)
from deepspec.errors import UserError
from deepspec.files import check_writable


def download(
    names: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="A named set, a Hub id, or JSONL, CSV and Parquet files."),
    ],
    out: Annotated[Path, typer.Option(help="JSONL file to write. Only a complete file appears.")],
    columns: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="FIELD=COLUMN", help="For example prompt=question; once per field."),
    ] = None,
    id_column: Annotated[
        str | None, typer.Option("--id", metavar="COLUMN", help="The same as --map id=COLUMN.")
    ] = None,
    domain: Annotated[
        str | None, typer.Option(help="Domain of all rows; results have a line for each.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="A Hub data set's config.")] = None,
    split: Annotated[str | None, typer.Option(help="A Hub data set's split (train).")] = None,
    copies: Annotated[
        list[Path] | None,
        typer.Option("--from", metavar="FILE", help="Read a named set from this local file or folder."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Keep N rows, chosen by the seed; 0: all. A named benchmark has its published N by default.",
        ),
    ] = None,
    seed: Seed = 0,
    drop_repeats: DropRepeats = False,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Convert any data set to a file of conversations.

    The named sets are open-perfectblend, for training, and these benchmarks, worded as published: gsm8k,
    math500, aime25, humaneval, mbpp, livecodebench, mt-bench, arena-hard-v2 and alpaca. pocket:train,
    pocket:select and pocket:test come with this package.

    \b
    Example:
      deepspec data download gsm8k --out gsm8k.jsonl
      deepspec data download logs/*.jsonl --out prompts.jsonl --domain support
      deepspec data download OWNER/NAME --split test --map prompt=question --out prompts.jsonl
    """
    from deepspec.data.catalogue import DATASETS
    from deepspec.data.download import download as run
    from deepspec.data.sources import Wanted, open_source
    from deepspec.pocket import prompts_path

    names = [str(prompts_path(name)) for name in names]
    known = DATASETS.get(names[0])
    if limit is None:
        limit = (known.rows if known else None) or 0
    wanted = Wanted(names, column_map(columns or [], id_column), domain, config, split, copies or ())
    skipped = skipping(skip_bad)
    check_writable(out)
    rows, source = open_source(wanted, skipped), ", ".join(names)
    done = run(rows, out, source=source, limit=limit, seed=seed, drop_repeats=drop_repeats, skipped=skipped)
    report_skipped(skipped)
    if as_json:
        asked = {"out": str(out), "limit": limit, "seed": seed}
        print_json({**asked, **vars(done), "skipped": skipped.as_json()})
        return
    chosen = f" of {done.read:,}, chosen by seed {seed}" if limit and done.rows == limit < done.read else ""
    typer.echo(f"{out}: {done.rows:,} rows{chosen}, {done.answered:,} of them with an answer")
    say_repeats(done.repeats, drop_repeats)
    if known and known.rows:
        words = ["deepspec", "eval", "--target", "TARGET", "--draft", "DRAFT", "--prompts", str(out)]
    else:
        folder = out.with_suffix("") if out.suffix else f"{out}-split"
        words = ["deepspec", "data", "split", str(out), "--out", str(folder)]
    typer.echo(f"next: {shlex.join(words)}")


def column_map(words: list[str], id_column: str | None) -> dict[str, str]:
    """["prompt=question"] and --id as {field: column}. Raises UserError."""
    columns: dict[str, str] = {}
    for word in [*words, *([f"id={id_column}"] if id_column else [])]:
        name, equals, column = word.partition("=")
        if not (name and equals and column):
            raise UserError(f"--map {word!r} is not FIELD=COLUMN", next_step="as in --map prompt=question")
        if columns.setdefault(name, column) != column:
            raise UserError(f"--map fills {name!r} from both {columns[name]!r} and {column!r}")
    return columns
