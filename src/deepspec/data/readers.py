"""Rows of JSONL, CSV and Parquet files and of data sets on the Hub, read one at a time.

Every reader yields (place, row): "file:line" (JSONL, CSV) or "file row n", and the row's columns as a dict.
JSONL and CSV need the standard library alone; Parquet and the Hub need the extra `deepspec[data]`.
"""

from __future__ import annotations

import csv
import importlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from deepspec.connections import check_hub
from deepspec.data.csv_rows import csv_rows
from deepspec.data.skipping import Skipped, refuse
from deepspec.errors import DataError, UserError, first_line

Row = tuple[str, object]
"""Where the row is, for error messages, and its content: a dict, unless a JSONL line holds something else."""

MAX_LINE = 256 << 20
"""Bytes of one line. Lines are held in memory whole: this stops a file without line ends from filling it."""
EXAMPLE = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLES = (*DELIMITERS, ".parquet")
"""Endings of files that have every column in every row."""
BATCH = 256
"""Rows of a Parquet file that become Python objects at once."""

_OTHER_KINDS = {  # first bytes -> what the file is, and how to convert it
    b"\xff\xfe": ("UTF-16", "iconv -f utf-16 -t utf-8 IN > OUT"),
    b"\xfe\xff": ("UTF-16", "iconv -f utf-16 -t utf-8 IN > OUT"),
    b"\x1f\x8b": ("compressed (gzip)", "gunzip -k FILE.gz"),
    b"PAR1": ("Parquet", "rename it to end in .parquet"),
}


def file_rows(
    path: Path, skipped: Skipped | None = None, columns: Sequence[str] = (), also: Iterable[str] = ()
) -> Iterator[Row]:
    """A file's rows, read by the ending of its name: .csv, .tsv, .parquet, and anything else as JSONL.

    `columns`: the columns of a Parquet file to read, by default all; `also`: those to read too if the file
    has them. Raises DataError with the place of a bad row, or counts it in `skipped`.
    """
    ending = path.suffix.lower()
    if ending in DELIMITERS:
        csv.field_size_limit(MAX_LINE)
        # Without `skipped`: a line that is not text cannot be left out of the middle of a row.
        return csv_rows(_lines(path), DELIMITERS[ending], skipped)
    return _parquet_rows(path, columns, also) if ending == ".parquet" else jsonl_rows(path, skipped)


def jsonl_rows(path: Path, skipped: Skipped | None = None) -> Iterator[Row]:
    """The parsed JSON of every line that is not blank. Raises DataError as `file_rows` does."""
    if path.suffix.lower() in TABLES:
        step = f"convert it first: deepspec data download {path} --out {path.with_suffix('.jsonl')}"
        raise DataError("a table is given where a JSONL file is expected", where=str(path), next_step=step)
    for where, text in _lines(path, skipped):
        if text and not text.isspace():
            try:
                row = parse_json(text, where)
            except DataError as error:
                refuse(error, skipped)
                continue
            yield where, row


def json_of(text: str) -> Any:
    """The data of JSON text. Raises ValueError, also for a number that would become infinite."""
    value = from_json(text, allow_inf_nan=False)
    if not _finite(value):
        raise ValueError("a number is too large")
    return value


def _finite(value: Any) -> bool:
    if not isinstance(value, dict | list):
        return not isinstance(value, float) or math.isfinite(value)
    items = value.values() if isinstance(value, dict) else value
    # Thousands of token ids need no look at each.
    return {float, dict, list}.isdisjoint(map(type, items)) or all(map(_finite, items))


def parse_json(text: str, where: str, cell: str | None = None) -> Any:
    """The data of a line of JSON, or of a `cell` of that name. Raises DataError."""
    try:
        return json_of(text)
    except ValueError as error:
        what = f"'{cell}' is malformed JSON" if cell else "malformed JSON"
        step = one_object_a_line(text.startswith("["))
        reason = str(error).replace("line 1 column", "column")
        reason = reason.replace("line 2 column 0", "the end of the line")
        if "hex escape" in reason:
            reason = f"half a surrogate pair ({reason})"
            step = "repair the text where it was cut, or remove the row"
        elif not cell and not text.endswith("\n"):
            reason += " (the line has no end: was the file cut while it was written?)"
        raise DataError(f"{what}: {reason}", where=where, next_step=None if cell else step) from error


def one_object_a_line(array: bool = False) -> str:
    """What to do about a line that is not an object; the usual reason is one JSON array of all rows."""
    if array:
        return "if the file is one array of rows: jq -c '.[]' in.json > out.jsonl"
    return f"write one object per line: {EXAMPLE}"


def _lines(path: Path, skipped: Skipped | None = None) -> Iterator[tuple[str, str]]:
    """("file:line", text with its line end) of every line.

    Raises DataError if the file cannot be opened or is not UTF-8 text at all. A line that is too long or not
    UTF-8 is counted in `skipped`, and raises DataError without it.
    """
    try:
        stream = path.open("rb")
    except OSError as error:
        raise DataError(
            f"cannot read the conversations: {error.strerror or error}",
            where=str(path),
            next_step="give the path of a JSONL file, one conversation per line",
        ) from error
    with stream:
        # Lines end at b"\n" only: decoded text would also be split at a U+2028 inside a message.
        for number, raw in enumerate(iter(lambda: stream.readline(MAX_LINE + 1), b""), start=1):
            where = f"{path}:{number}"
            if number == 1:
                raw = _without_mark(raw, where)
            try:
                text = line_text(raw, where)
            except DataError as error:
                refuse(error, skipped)
                while raw and not raw.endswith(b"\n"):  # the rest of a line that is too long
                    raw = stream.readline(1 << 20)
                continue
            yield where, text


def _without_mark(raw: bytes, where: str) -> bytes:
    """A file's first line without its byte-order mark."""
    for start, (kind, remedy) in _OTHER_KINDS.items():
        if raw.startswith(start):
            raise DataError(f"the file is {kind}, expected UTF-8 text", where=where, next_step=remedy)
    return raw.removeprefix(b"\xef\xbb\xbf")


def line_text(raw: bytes, where: str) -> str:
    """A line of a file as text. Raises DataError."""
    if len(raw) > MAX_LINE and not raw.endswith(b"\n"):
        raise DataError(
            f"the line is longer than {MAX_LINE >> 20} MiB", where=where, next_step="write one row per line"
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line",
            where=where,
            next_step="convert the file, for example: iconv -f latin1 -t utf-8 IN > OUT",
        ) from error


def _parquet_rows(path: Path, columns: Sequence[str], also: Iterable[str]) -> Iterator[Row]:
    parquet = _import("pyarrow.parquet")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            chosen = _chosen(columns, also, schema.names)
            batches = file.iter_batches(batch_size=BATCH, columns=chosen)
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield f"{path} row {number}", _table_row(row, schema)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        after = f" after row {number}" if number else ""
        raise DataError(
            f"cannot read the Parquet file{after}: {first_line(error)}", where=str(path)
        ) from error


def hub_rows(
    repo: str,
    config: str | None = None,
    split: str = "train",
    *,
    files: Sequence[str] = (),
    columns: Sequence[str] = (),
    also: Iterable[str] = (),
) -> Iterator[Row]:
    """Rows of a data set on the Hub, or of a local copy of its repository, streamed: nothing is kept on disk.

    `files`: JSONL files of the repository to read instead of a config and a split. `columns`: the columns to
    read, by default all; `also`: those to read too if the set has them. Raises DataError if the data set or
    the network cannot be reached.
    """
    datasets = _import("datasets")
    check_hub()
    datasets.disable_progress_bars()
    place = ", ".join(files or filter(None, (config, split)))
    number = 0
    try:
        if files:
            urls = [f"hf://datasets/{repo}/{name}" for name in files]
            data = datasets.load_dataset("json", data_files=urls, split="train", streaming=True)
        else:
            data = datasets.load_dataset(repo, config, split=split, streaming=True)
        if chosen := _chosen(columns, also, data.column_names or ()):
            data = data.select_columns(chosen)
        features = getattr(data, "features", None)
        schema = features.arrow_schema if features else None
        for number, row in enumerate(data, start=1):
            yield f"{repo} ({place}) row {number}", _table_row(row, schema, decoded=True)
    except Exception as error:  # the network, the Hub and the file formats raise a dozen unrelated classes
        after = f" after {number} rows" if number else ""
        raise DataError(
            f"cannot read {repo}{after}: {first_line(error)}",
            where=place,
            # A ValueError: there is no such config, split or column, and its message lists those there are.
            next_step="choose from what there is with --config, --split and --map"
            if type(error) is ValueError
            else "without a network, copy the data set's files to this machine and read them: "
            "deepspec data download FILE.parquet (or .jsonl, .csv) --out OUT.jsonl, "
            "for a set known by name: deepspec data download NAME --from FILE",
        ) from error


def _chosen(columns: Sequence[str], also: Iterable[str], there: Sequence[str]) -> list[str] | None:
    """The columns to read. None, for all of them, if one is missing too: the map's error then lists them."""
    heads = dict.fromkeys(name if name in there else name.split(".")[0] for name in columns)
    if not heads or not all(head in there for head in heads):
        return None
    return [*heads, *(name for name in also if name in there and name not in heads)]


def _table_row(row: Mapping[str, Any], schema: Any, decoded: bool = False) -> dict[str, Any]:
    """The row of a table with that Arrow schema (None if unknown) as JSON data. `decoded`: so is its JSON."""
    types = _types(schema)
    return {name: _plain(value, types.get(name), decoded) for name, value in row.items()}


def _types(kind: Any) -> dict[str, Any]:
    """The types in a schema or a struct, by name; none for another type."""
    return {field.name: field.type for field in kind} if hasattr(kind, "get_field_index") else {}


def _plain(value: Any, kind: Any, decoded: bool) -> Any:
    """A value of that Arrow type as JSON data: numbers that JSON lacks become None; dates and so on, text.

    A struct has the keys of all rows, with null for each that this row lacked, so its nulls are left out. A
    map and JSON have the keys of this row alone, and their nulls are kept.
    """
    if getattr(kind, "extension_name", None) == "arrow.json":
        return value if decoded or value is None else json_of(value)
    if hasattr(kind, "item_type") and value is not None:
        return {str(key): _plain(item, kind.item_type, decoded) for key, item in dict(value).items()}
    if isinstance(value, Mapping):
        types, there = _types(kind), {key: item for key, item in value.items() if item is not None}
        return {str(key): _plain(item, types.get(key), decoded) for key, item in there.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, getattr(kind, "value_type", None), decoded) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    return value if value is None or isinstance(value, str | int) else str(value)


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{module.split('.')[0]!r} is not installed ({error})",
            where="reading Parquet files and data sets of the Hub",
            next_step="pip install 'deepspec[data]'; JSONL and CSV files can be read without it",
        ) from error
