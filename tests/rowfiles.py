"""Files of rows for the tests of data sources, and the `data` commands called on them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deepspec.cli import app
from deepspec.data.conversations import read_conversations

SHARED = Path(__file__).resolve().parents[2] / "shared"
EVAL = SHARED / "data" / "eval"
REQUIRED = os.environ.get("DEEPSPEC_REQUIRE_GOLDEN") == "1" and SHARED.exists()


def shared(path: Path) -> Path:
    """A file that lies beside the repository; a test is skipped without it, unless it is required."""
    if not path.exists() and not REQUIRED:
        pytest.skip(f"no {path.name} beside the repository")
    return path


def call(*words: Any) -> Any:
    return CliRunner().invoke(app, ["data", *(str(word) for word in words)])


def good(*words: Any) -> str:
    result = call(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*words: Any) -> str:
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), "utf-8")
    return path


def questions(path: Path) -> list[str]:
    return [row.messages[0]["content"] for row in read_conversations(path)]
