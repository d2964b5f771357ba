"""From any data set to a file of conversations: named sets, the Hub, and local JSONL, CSV and Parquet files.

`open_source` gives validated conversations one at a time, `download` writes them: ids made unique, cut to a
number of rows by a seed, whole or not at all. Nothing here holds more than a few rows.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepspec.data.conversations import (
    Conversation,
    conversation_from_row,
    line_of,
    write_conversations,
)
from deepspec.data.lines import Skipped, refuse
from deepspec.data.named import SOURCES, NamedSource, worded
from deepspec.data.tables import DELIMITERS, Row, file_rows, hub_rows
from deepspec.data.unique import Unique
from deepspec.errors import DataError, UserError, nearest
from deepspec.log import progress

FIELDS = ("messages", "conversations", "turns", "prompt", "response", "request", "body", "id", "domain")
"""What a column map may fill."""

BAR_ROWS = 256
"""Rows between two updates of the bar, which cost more than a row."""

_FILE_ENDINGS = (*DELIMITERS, ".parquet", ".jsonl", ".ndjson", ".json")
_JSON_FIELDS = ("messages", "conversations", "turns", "request", "body")
"""Fields that are lists or objects; a table without such columns holds them as JSON text."""


@dataclass(frozen=True)
class Wanted:
    """What to read and how: names as on the command line, and which column fills which field.

    `names`: one named set, one Hub id or one folder, or any number of files. `columns`: field -> column
    ("a.b" reaches into objects); with a map, only mapped columns are read. `copies`: local files in place of
    a named set's own.
    """

    names: Sequence[str]
    columns: Mapping[str, str]
    domain: str | None = None
    config: str | None = None
    split: str | None = None
    copies: Sequence[Path] = ()


def open_source(wanted: Wanted, skipped: Skipped | None = None) -> Iterator[Conversation]:
    """The source's rows as conversations.

    Raises UserError for a source that is not there or does not fit its options, before the first row where
    that can be known; DataError for a row that breaks the schema, or counts it in `skipped`.
    """
    if wanted.names and (source := SOURCES.get(wanted.names[0])):
        domain = wanted.domain or (wanted.names[0] if source.rows else None)
        rows = _named_rows(wanted, source, skipped)
        return _conversations(rows, lambda row, at: _with_domain(worded(source, row, at), domain), skipped)
    unknown = next((field for field in wanted.columns if field not in FIELDS), None)
    if unknown is not None:
        near = nearest(unknown, FIELDS)
        raise UserError(
            f"no field {unknown!r} to map a column to" + (f", did you mean {near!r}?" if near else ""),
            next_step=f"--map FIELD=COLUMN, the fields are {', '.join(FIELDS)}",
        )
    if wanted.copies:
        raise UserError(
            "--from gives a named data set's local files", next_step=f"names: {', '.join(SOURCES)}"
        )
    rows = _unnamed_rows(wanted, skipped)
    return _conversations(rows, lambda row, at: mapped(row, wanted.columns, wanted.domain, at), skipped)


def mapped(
    row: Mapping[str, Any], columns: Mapping[str, str], domain: str | None, where: str
) -> dict[str, Any]:
    """A row with its fields under our names. Raises DataError where a mapped column is not there."""
    made: dict[str, Any] = {field: _column(row, name, where) for field, name in columns.items()} or dict(row)
    if isinstance(made.get("id"), int):
        made["id"] = str(made["id"])
    log = isinstance(made.get("request") or made.get("body"), str | Mapping)
    for field in (*_JSON_FIELDS, *(["response"] if log else [])):
        text = made.get(field)
        if isinstance(text, str) and text.lstrip()[:1] in ("[", "{"):
            try:
                made[field] = json.loads(text)
            except ValueError as error:
                raise DataError(f"'{field}' is malformed JSON: {error}", where=where) from error
    return _with_domain(made, domain)


def cut(rows: Iterable[Conversation], limit: int, seed: int, folder: Path) -> Iterator[Conversation]:
    """At most `limit` rows: those with the smallest SHA-256 of (seed, id), in that order.

    The choice depends on ids alone, not on the order of the rows; a larger limit only adds rows. Wanted there
    are no more than `limit`, all of them, in their own order. Until the end is known, rows wait in a
    temporary file in `folder`: a small part of a large source, as ever fewer rows are among the smallest.
    """
    kept: list[tuple[int, int, int]] = []  # (−key, offset, bytes): the largest key of the kept ones leads
    cutting = False
    with tempfile.TemporaryFile(dir=folder) as waiting:
        for row in rows:
            key = int.from_bytes(hashlib.sha256(f"{seed}\0{row.id}".encode()).digest()[:8])
            cutting = len(kept) == limit
            if cutting and key >= -kept[0][0]:
                continue
            line = line_of(row)
            entry = (-key, waiting.tell(), len(line))
            waiting.write(line)
            (heapq.heapreplace if cutting else heapq.heappush)(kept, entry)
        order = sorted(kept, reverse=True) if cutting else sorted(kept, key=lambda entry: entry[1])
        for _, offset, size in order:
            waiting.seek(offset)
            yield conversation_from_row(json.loads(waiting.read(size)))


@dataclass
class Downloaded:
    """What `download` did: rows read (bad ones aside), written, with answers, and prompts that came again."""

    read: int = 0
    rows: int = 0
    answered: int = 0
    repeats: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def download(
    rows: Iterable[Conversation],
    out: Path,
    *,
    limit: int = 0,
    seed: int = 0,
    drop_repeats: bool = False,
    skipped: Skipped | None = None,
) -> Downloaded:
    """Write conversations to `out`, all of them or none; `limit` > 0 cuts them (`cut`).

    A prompt that comes again is kept under an id of its own, or dropped (`drop_repeats`). Raises DataError
    for an id that comes twice and where no row is left.
    """
    done = Downloaded()
    out.parent.mkdir(parents=True, exist_ok=True)
    with Unique(drop_repeats=drop_repeats) as unique, progress("reading rows", None) as bar:

        def incoming() -> Iterator[Conversation]:
            for row in rows:
                done.read += 1
                if done.read % BAR_ROWS == 0:
                    bar.update(BAR_ROWS, repeats=unique.repeats, skipped=skipped.count if skipped else 0)
                yield row

        def outgoing() -> Iterator[Conversation]:
            kept = unique.rows(incoming(), skipped)
            for row in cut(kept, limit, seed, out.parent) if limit else kept:
                done.answered += row.messages[-1]["role"] == "assistant"
                yield row
            if not done.read:
                raise nothing_left(skipped)

        done.rows = write_conversations(out, outgoing())
        done.repeats = unique.repeats
    return done


def nothing_left(skipped: Skipped | None) -> DataError:
    """For a source without a single usable row; what was there before it stays."""
    if not skipped or not skipped.count:
        return DataError("the source has no rows")
    places = f"; the first: {skipped.places[0]}" if skipped.places else ""
    return DataError(
        f"no rows left: all {skipped.count} were bad{places}",
        next_step="say which column is which with --map (docs/data.md)",
    )


# -- reading -----------------------------------------------------------------------------------------------


def _conversations(
    rows: Iterable[Row], make: Callable[[Mapping[str, Any], str], dict[str, Any]], skipped: Skipped | None
) -> Iterator[Conversation]:
    for where, row in rows:
        try:
            fields = make(row, where) if isinstance(row, Mapping) else row
            conversation = conversation_from_row(fields, where)
        except DataError as error:
            refuse(error, skipped)
            continue
        yield conversation


def _named_rows(wanted: Wanted, source: NamedSource, skipped: Skipped | None) -> Iterator[Row]:
    name = wanted.names[0]
    if len(wanted.names) > 1:
        raise UserError(f"{name} is a data set of its own", next_step="download each set to its own file")
    if wanted.columns or wanted.config or wanted.split:
        raise UserError(
            f"{name} brings its own columns, config and split",
            next_step=f"--map, --config and --split are for its Hub id, {source.repo}",
        )
    if not wanted.copies:
        return hub_rows(source.repo, source.config, source.split, files=source.files, columns=source.columns)
    return (row for copy in wanted.copies for row in _copy_rows(copy, source, skipped))


def _copy_rows(copy: Path, source: NamedSource, skipped: Skipped | None) -> Iterator[Row]:
    if not copy.is_dir():
        return file_rows(copy, skipped, source.columns)
    if source.files:
        return (row for name in source.files for row in file_rows(copy / name, skipped))
    return hub_rows(str(copy), source.config, source.split, columns=source.columns)


def _unnamed_rows(wanted: Wanted, skipped: Skipped | None) -> Iterator[Row]:
    names, columns = wanted.names, list(wanted.columns.values())
    # A pipe, such as a shell's <(zcat log.gz), is no regular file and is read all the same.
    files = [
        path
        for path in map(Path, names)
        if not path.is_dir() and (path.exists() or path.suffix.lower() in _FILE_ENDINGS)
    ]
    if len(files) == len(names):
        if wanted.config or wanted.split:
            raise UserError("--config and --split are for data sets of the Hub, not for files")
        if missing := next((file for file in files if not file.exists()), None):
            raise DataError("no such file", where=str(missing))
        return (row for file in files for row in file_rows(file, skipped, columns))
    if len(names) == 1 and (Path(names[0]).is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+", names[0])):
        return hub_rows(names[0], wanted.config, wanted.split or "train", columns=columns)
    wrong = next(name for name in names if Path(name) not in files)
    near = nearest(wrong, SOURCES)
    raise UserError(
        f"no data set {wrong!r}" + (f", did you mean {near!r}?" if near else ""),
        next_step=f"give a file, a Hub id (OWNER/NAME), or one of {', '.join(SOURCES)}",
    )


def _column(row: Mapping[str, Any], name: str, where: str) -> Any:
    """The column's value; dots reach into objects where no column has the whole name."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            near = nearest(name, row)
            raise DataError(
                f"no column '{name}'; found {', '.join(repr(key) for key in list(row)[:12])}",
                where=where,
                next_step=f"did you mean '{near}'?" if near else "name another column in --map",
            )
        value = value[part]
    return value


def _with_domain(row: dict[str, Any], domain: str | None) -> dict[str, Any]:
    return row if domain is None else {**row, "domain": domain}
