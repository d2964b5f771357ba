"""Sources of conversations: sets known by name, the Hub, and local JSONL, CSV and Parquet files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepspec.data.catalogue import DATASETS, NamedDataset, worded
from deepspec.data.conversations import Conversation, conversation_from_row
from deepspec.data.formats import REASONS
from deepspec.data.prompt_columns import ALPACA, PROMPT_COLUMNS, is_empty
from deepspec.data.readers import TABLES, Row, file_rows, hub_rows, parse_json
from deepspec.data.skipping import Skipped, refuse
from deepspec.errors import DataError, UserError, nearest
from deepspec.log import warn

FIELDS = (
    *("messages", "conversations", "turns", "prompt", "response", "instruction", "input", "output"),
    *("request", "body", "system", "tools", "functions", "id", "domain"),
)
"""The fields that a column map may fill."""

_FILE_ENDINGS = (*TABLES, ".jsonl", ".ndjson", ".json")
_JSON_FIELDS = (
    *("messages", "conversations", "turns", "request", "body"),
    *("meta", "answer_ids", "cut_turns"),
)
"""Fields that are lists or objects; a table without such columns holds them as JSON text."""


@dataclass(frozen=True)
class Wanted:
    """What to read, as on the command line, and which column fills which field.

    `names`: one set known by name, one Hub id or one folder, or any number of files. `columns`: field ->
    column ("a.b" reaches into objects); with a map, only the mapped columns are read. `copies`: local files
    of a set known by name, read instead of the Hub's.
    """

    names: Sequence[str]
    columns: Mapping[str, str]
    domain: str | None = None
    config: str | None = None
    split: str | None = None
    copies: Sequence[Path] = ()


def open_source(wanted: Wanted, skipped: Skipped | None = None) -> Iterator[Conversation]:
    """The source's rows as conversations.

    Raises UserError for a source that does not exist or does not fit its options, if possible before the
    first row; DataError for a row that breaks the schema, or counts it in `skipped`.
    """
    if wanted.names and (known := DATASETS.get(wanted.names[0])):
        domain = wanted.domain or (wanted.names[0] if known.rows else None)
        rows = _known_rows(wanted, known, skipped)
        return _conversations(rows, lambda row, at: worded(known, row, at), domain, skipped)
    unknown = next((field for field in wanted.columns if field not in FIELDS), None)
    if unknown is not None:
        near = nearest(unknown, FIELDS)
        raise UserError(
            f"no field {unknown!r} to map a column to" + (f", did you mean {near!r}?" if near else ""),
            next_step=f"--map FIELD=COLUMN, the fields are {', '.join(FIELDS)}",
        )
    if wanted.copies:
        raise UserError(
            "--from is only for the local files of a set known by name",
            next_step=f"the names are {', '.join(DATASETS)}",
        )
    left_out = _unmapped(wanted.columns)

    def make(row: Mapping[str, Any], where: str) -> dict[str, Any]:
        for name in [name for name in left_out if not is_empty(row.get(name))]:
            left_out.remove(name)  # one warning is enough
            warn(f"--map leaves out the column '{name}', which may be part of the prompt: map a field to it")
        return mapped(row, wanted.columns, where)

    return _conversations(_other_rows(wanted, skipped), make, wanted.domain, skipped)


def _unmapped(columns: Mapping[str, str]) -> list[str]:
    """Columns of the prompt that a map leaves out. Beside whole conversations some are common metadata."""
    metadata = () if columns.keys() & {"prompt", "instruction"} else ALPACA
    return [name for name in PROMPT_COLUMNS if columns and name not in (*columns.values(), *metadata)]


def mapped(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """A row with our field names. Raises DataError if a mapped column is missing."""
    made: dict[str, Any] = {field: _column(row, name, where) for field, name in columns.items()} or dict(row)
    if isinstance(made.get("id"), int):
        made["id"] = str(made["id"])
    log = isinstance(made.get("request") or made.get("body"), str | Mapping)
    for field in (*_JSON_FIELDS, *(["response"] if log else [])):
        text = made.get(field)
        if isinstance(text, str) and text.lstrip()[:1] in ("[", "{"):
            made[field] = parse_json(text, where, field)
    return made


def _conversations(
    rows: Iterable[Row],
    make: Callable[[Mapping[str, Any], str], dict[str, Any]],
    domain: str | None,
    skipped: Skipped | None,
) -> Iterator[Conversation]:
    for where, row in rows:
        try:
            fields = make(row, where) if isinstance(row, Mapping) else row
            if domain is not None and isinstance(fields, dict):
                fields["domain"] = domain
            conversation = conversation_from_row(fields, where)
        except DataError as error:
            refuse(error, skipped)
            continue
        yield conversation


def _known_rows(wanted: Wanted, source: NamedDataset, skipped: Skipped | None) -> Iterator[Row]:
    name = wanted.names[0]
    if len(wanted.names) > 1:
        raise UserError(
            f"{name} cannot be mixed with other sources", next_step="download each set to its own file"
        )
    if wanted.columns or wanted.config or wanted.split:
        raise UserError(
            f"{name} has fixed columns, config and split",
            next_step=f"--map, --config and --split are for its Hub id, {source.repo}",
        )
    if not wanted.copies:
        return hub_rows(source.repo, source.config, source.split, files=source.files, columns=source.columns)
    return (row for copy in wanted.copies for row in _copy_rows(copy, source, skipped))


def _copy_rows(copy: Path, source: NamedDataset, skipped: Skipped | None) -> Iterator[Row]:
    if not copy.is_dir():
        return file_rows(copy, skipped, source.columns)
    if source.files:
        return (row for name in source.files for row in file_rows(copy / name, skipped))
    return hub_rows(str(copy), source.config, source.split, columns=source.columns)


def _other_rows(wanted: Wanted, skipped: Skipped | None) -> Iterator[Row]:
    names, columns, also = wanted.names, list(wanted.columns.values()), _unmapped(wanted.columns)
    # A pipe, such as a shell's <(zcat log.gz), is not a regular file but can be read too.
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
        return (row for file in files for row in _file_rows(file, skipped, columns, also))
    if len(names) == 1 and (Path(names[0]).is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+", names[0])):
        return _table_rows(
            hub_rows(names[0], wanted.config, wanted.split or "train", columns=columns, also=also)
        )
    wrong = next(name for name in names if Path(name) not in files)
    near = nearest(wrong, DATASETS)
    raise UserError(
        f"no data set {wrong!r}" + (f", did you mean {near!r}?" if near else ""),
        next_step=f"give a file, a Hub id (OWNER/NAME), or one of {', '.join(DATASETS)}",
    )


def _file_rows(path: Path, *how: Any) -> Iterator[Row]:
    rows = file_rows(path, *how)
    return _table_rows(rows) if path.suffix.lower() in TABLES else rows


def _table_rows(rows: Iterable[tuple[str, Any]]) -> Iterator[Row]:
    """The rows without null reasons. A table has every column in every row: they tell of no cut answer."""
    for where, row in rows:
        yield where, {k: v for k, v in row.items() if v is not None or k not in REASONS}


def _column(row: Mapping[str, Any], name: str, where: str) -> Any:
    """The column's value; dots reach into objects unless a column has the whole name."""
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
