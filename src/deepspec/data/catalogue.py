"""Data sets known by name: where the Hub keeps their rows, which columns matter, how a prompt is worded.

There is one entry per data set in datasets.yaml, and `data.sources` reads them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

import yaml
from pydantic import TypeAdapter

from deepspec.errors import DataError


@dataclass(frozen=True)
class NamedDataset:
    """A data set on the Hub and how its columns become a prompt.

    `files`: JSONL files of the repository, read in this order instead of a config and a split. `rows`: how
    many the published protocol uses; a seed chooses them from a larger set. `fields`: field of our row ->
    column. `prompt`: the prompt's template, which names columns in braces. `variant`: (column, template),
    the template to use instead if that column is not empty.
    """

    repo: str
    config: str | None = None
    split: str = "train"
    files: tuple[str, ...] = ()
    rows: int | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    prompt: str = ""
    variant: tuple[str, str] = ("", "")

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is read, each once."""
        column, template = self.variant
        used = (*self.fields.values(), *_columns_of(template), *_columns_of(self.prompt), column)
        return tuple(dict.fromkeys(filter(None, used)))

    @property
    def place(self) -> str:
        """Config and split, or the files, as the documentation and error messages name them."""
        return ", ".join(self.files or filter(None, (self.config, self.split)))


DATASETS = TypeAdapter(dict[str, NamedDataset]).validate_python(
    yaml.safe_load(Path(__file__).with_name("datasets.yaml").read_text(encoding="utf-8"))
)


def worded(source: NamedDataset, row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The row's fields as `source` words them. Raises DataError if a column is missing or not text."""
    if missing := [column for column in source.columns if column not in row]:
        raise DataError(
            f"no column '{missing[0]}'; found {', '.join(map(repr, list(row)[:8]))}",
            where=where,
            next_step=f"expected a copy of {source.repo} ({source.place})",
        )
    made = {name: row[column] for name, column in source.fields.items()}
    column, variant = source.variant
    template = variant if column and row[column] else source.prompt
    for name in _columns_of(template):
        if not isinstance(row[name], str):
            raise DataError(f"column '{name}' is not text: {row[name]!r}"[:200], where=where)
    return {**made, "prompt": template.format_map(row)} if template else made


def _columns_of(template: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(template) if name]
