"""The page of benchmarks is its data file, and the README cites figures that are in it."""

from __future__ import annotations

import datetime
import re
import shlex
from typing import Any

import pytest

import table
from deepspec.cli import app

ROOT = table.PAGE.parents[1]
QUESTIONS = table.questions()
RUNS = [(entry, run) for entry in QUESTIONS for run in entry["runs"]]


def test_page_is_the_data_file():
    assert table.PAGE.read_text("utf-8") == table.page(), "run: python benchmarks/table.py --write"


@pytest.mark.parametrize(("entry", "run"), RUNS, ids=[f"{e['question']} {r['date']}" for e, r in RUNS])
def test_run_says_what_to_type_when_and_where_and_fills_every_column(
    entry: dict[str, Any], run: dict[str, Any]
) -> None:
    """A row that is one cell short puts its figures under other headings."""
    assert run.keys() == {"command", "date", "hardware", "rows"}
    assert isinstance(run["date"], datetime.date) and run["hardware"]
    assert [len(row) for row in run["rows"]] == [len(entry["columns"])] * len(run["rows"])
    program, first, *_ = shlex.split(run["command"])
    if program == "python":
        assert (ROOT / first).is_file()
    elif program == "make":
        assert f"\n{first}:" in (ROOT / "Makefile").read_text("utf-8")
    else:
        assert program == "deepspec"
        assert first in {command.name for command in app.registered_commands}


def test_readme_cites_measured_figures():
    """Value and interval of the README's tables, of the real model and of the pocket target, in one row of
    their page each."""
    readme = (ROOT / "README.md").read_text("utf-8")
    cells = re.findall(r"^\| (DSpark|DFlash|Eagle-3) \| (.*) \|$", readme, re.MULTILINE)
    assert len(cells) == 6
    real = (ROOT / "docs" / "real.md").read_text("utf-8")
    for page, (draft, figures) in zip([real] * 3 + [table.page()] * 3, cells, strict=True):
        for figure in re.findall(r"\d\.\d\d \[\d\.\d\d, \d\.\d\d\]", re.sub("[×*]", "", figures)):
            assert re.search(rf"^\| {draft} \|(?:.*\|)? {re.escape(figure)} \|", page, re.MULTILINE), (
                draft,
                figure,
            )
