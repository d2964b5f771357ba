"""Rows as they lie in JSONL, CSV and Parquet files and in data sets of the Hub; a few in memory at a time.

Every reader yields (place, row): "file:line" (JSONL, CSV) or "file row n", and the row's columns as a dict.
JSONL and CSV need the standard library alone; Parquet and the Hub need the extra `deepspec[data]`.
"""

from __future__ import annotations

import csv
import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspec.data.conversations import read_rows
from deepspec.data.lines import Skipped, max_line_bytes, refuse, text_lines
from deepspec.errors import DataError, UserError

Row = tuple[str, object]
"""Where the row is, for error messages, and what it holds: a dict, unless a JSONL line is something else."""

DELIMITERS = {".csv": ",", ".tsv": "\t"}
BATCH = 256
"""Rows of a Parquet file turned into Python objects at once."""


def file_rows(path: Path, skipped: Skipped | None = None, columns: Sequence[str] = ()) -> Iterator[Row]:
    """A file's rows, read by its ending: .csv, .tsv, .parquet, anything else as JSONL.

    `columns`: what of a Parquet file is read, all of it by default. Raises DataError with the place of what
    cannot be read, or counts it in `skipped`.
    """
    ending = path.suffix.lower()
    if ending in DELIMITERS:
        return _csv_rows(path, DELIMITERS[ending], skipped)
    if ending == ".parquet":
        return _parquet_rows(path, columns)
    return read_rows(path, skipped)


def hub_rows(
    repo: str,
    config: str | None = None,
    split: str = "train",
    *,
    files: Sequence[str] = (),
    columns: Sequence[str] = (),
) -> Iterator[Row]:
    """Rows of a data set on the Hub, or of a local copy of its repository, streamed: nothing is kept on disk.

    `files`: JSONL files of the repository, read in place of a config and a split. `columns`: only these, all
    by default. Raises DataError where the data set, or the network, cannot be had.
    """
    datasets = _import("datasets")
    datasets.disable_progress_bars()
    place = ", ".join(files or filter(None, (config, split)))
    number = 0
    try:
        if files:
            urls = [f"hf://datasets/{repo}/{name}" for name in files]
            data = datasets.load_dataset("json", data_files=urls, split="train", streaming=True)
        else:
            data = datasets.load_dataset(repo, config, split=split, streaming=True)
        if chosen := _chosen(columns, data.column_names or ()):
            data = data.select_columns(chosen)
        for number, row in enumerate(data, start=1):
            yield f"{repo} ({place}) row {number}", _plain(row)
    # Whatever the network, the Hub or the file formats raise: a dozen unrelated classes.
    except Exception as error:
        raise _unreachable(repo, place, number, error) from error


def _unreachable(repo: str, place: str, rows: int, error: Exception) -> DataError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    if type(error) is ValueError:  # no such config, split or column: its message names those there are
        step = "name what there is with --config, --split and --map"
    else:
        step = (
            "without a network, bring the data set's files here another way and read those: "
            "deepspec data download FILE.parquet (or .jsonl, .csv) --out OUT.jsonl, "
            "for a set known by name: deepspec data download NAME --from FILE"
        )
    after = f" after {rows} rows" if rows else ""
    return DataError(f"cannot read {repo}{after}: {reason[0]}", where=place, next_step=step)


def _csv_rows(path: Path, delimiter: str, skipped: Skipped | None) -> Iterator[Row]:
    taken: list[str] = []

    def lines() -> Iterator[str]:
        # A row may span lines, so a line that is no text must not vanish from the middle of one.
        for where, text in text_lines(path, errors="surrogateescape"):
            taken.append(where)
            yield text

    csv.field_size_limit(max_line_bytes())
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    heads: list[str] | None = None
    while True:
        taken.clear()
        try:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise DataError(
                    f"malformed CSV: {error}",
                    where=taken[0] if taken else str(path),
                    next_step="quote cells that hold quotes, commas or line ends; double the quotes inside",
                ) from error
            if cells is None:
                return
            if not cells:
                continue
            row = _csv_row(heads, cells, taken[0])
        except DataError as error:
            refuse(error, skipped if heads else None)
            continue
        if heads is None:
            heads = cells
        else:
            yield taken[0], row


def _csv_row(heads: list[str] | None, cells: list[str], where: str) -> dict[str, str | None]:
    """The row by column, an empty cell as None; the first row only names the columns."""
    try:
        "".join(cells).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            "not UTF-8",
            where=where,
            next_step="convert the file, for example: iconv -f latin1 -t utf-8 in.csv > out.csv",
        ) from error
    if heads is None:
        if twice := {head for head in cells if cells.count(head) > 1}:
            raise DataError(f"two columns are named {min(twice)!r}", where=where, next_step="rename one")
        return {}
    if len(cells) != len(heads):
        raise DataError(f"{len(cells)} cells, but the first row names {len(heads)} columns", where=where)
    return {head: cell or None for head, cell in zip(heads, cells, strict=True)}


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    parquet = _import("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            chosen = _chosen(columns, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=BATCH, columns=chosen):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", _plain(row)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        reason = str(error).splitlines() or [type(error).__name__]
        raise DataError(
            f"cannot read the Parquet file{f' after row {number}' if number else ''}: {reason[0]}",
            where=str(path),
        ) from error


def _chosen(columns: Sequence[str], there: Sequence[str]) -> list[str] | None:
    """The columns to read; None for all, also where one is missing: the map then says which there are."""
    heads = dict.fromkeys(name if name in there else name.split(".")[0] for name in columns)
    return list(heads) if heads and all(head in there for head in heads) else None


def _plain(value: Any) -> Any:
    """A table's value as JSON data: numbers that JSON lacks become None, dates and the like their text."""
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    return value if isinstance(value, int) else str(value)


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise UserError(
            f"{package!r} is not installed ({error})",
            where="reading Parquet files and data sets of the Hub",
            next_step="pip install 'deepspec[data]'; JSONL and CSV files are read without it",
        ) from error
