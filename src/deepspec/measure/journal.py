"""What an evaluation has measured so far, beside the results file that it will become.

For `eval.json` that is `eval.partial.jsonl`: the conditions in its first line, then a line for each group of
prompts with what every method wrote and took. The same evaluation, started again after a kill, goes on with
the groups that are missing. Once the results are written the file goes (`forget`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from deepspec.files import JsonlWriter
from deepspec.log import note, warn


def beside(out: Path) -> Path:
    """eval.json -> eval.partial.jsonl"""
    return out.with_name(f"{out.stem}.partial.jsonl")


def forget(out: Path) -> None:
    """The results are written: what was kept on the way is no longer needed."""
    beside(out).unlink(missing_ok=True)


class Journal:
    """Groups that are there (`done`, by number), and more to write. A context.

    A file that holds the beginning of another evaluation steps aside. Raises UserError where the file cannot
    be written or another process is writing to it.
    """

    def __init__(self, out: Path, conditions: Mapping[str, Any]) -> None:
        self.path = beside(out)
        self.done: dict[int, dict[str, Any]] = {}
        self._file = JsonlWriter(self.path, alone=True)
        try:
            if self._file.size and not self._read(json.loads(json.dumps(conditions))):
                self._file.close()
                self._file = JsonlWriter(self.path, alone=True)
            if not self._file.size:
                self._file.write(conditions)
        except BaseException:
            self._file.close()
            raise

    def _read(self, conditions: dict[str, Any]) -> bool:
        """Take in what is there; False where it was another evaluation's, and has stepped aside."""
        with self.path.open("rb") as stream:
            first, *rest = map(json.loads, stream)
        other = next((key for key in {**first, **conditions} if first.get(key) != conditions.get(key)), None)
        if other is not None:
            aside = next(a for i in count(1) if not (a := self.path.with_suffix(f".old-{i}.jsonl")).exists())
            self.path.rename(aside)
            warn(f"{aside} holds the beginning of an evaluation with another '{other}'; this one begins anew")
            return False
        self.done = {line["group"]: line["methods"] for line in rest}
        note(f"{self.path}: going on after {len(self.done)} groups of prompts")
        return True

    def write(self, group: int, methods: Mapping[str, Any]) -> None:
        """Keep a finished group."""
        self._file.write({"group": group, "methods": methods})
        self._file.sync()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
