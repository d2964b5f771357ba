"""What an evaluation has measured so far, beside the results file that it will become.

For `eval.json` that is `eval.partial.jsonl`: the conditions in its first line, then a line for each group of
prompts with what every method wrote and took. The same evaluation, started again after a kill, goes on with
the groups that are missing. Once the results are written the file goes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from deepspec.errors import DataError
from deepspec.files import JsonlWriter, write_json
from deepspec.log import note


def beside(out: Path) -> Path:
    """eval.json -> eval.partial.jsonl"""
    return out.with_name(f"{out.stem}.partial.jsonl")


class Journal:
    """Groups that are there (`done`, by number), and more to write. A context.

    Raises DataError where the file holds another evaluation, UserError where it cannot be written or another
    process is writing to it.
    """

    def __init__(self, out: Path, conditions: Mapping[str, Any]) -> None:
        self.out, self.path = out, beside(out)
        self.done: dict[int, dict[str, Any]] = {}
        self._file = JsonlWriter(self.path, alone=True)
        try:
            if self._file.size:
                self._read(json.loads(json.dumps(conditions)))
            else:
                self._file.write(conditions)
        except BaseException:
            self._file.close()
            raise

    def _read(self, conditions: dict[str, Any]) -> None:
        first, *rest = (json.loads(line) for line in self.path.read_text("utf-8").splitlines())
        other = next((key for key in {**first, **conditions} if first.get(key) != conditions.get(key)), None)
        if other is not None:
            raise DataError(
                f"an evaluation under other conditions was begun here: {other} was {first.get(other)!r}, "
                f"now it is {conditions.get(other)!r}",
                where=str(self.path),
                next_step="delete the file to begin anew, or give another --out",
            )
        self.done = {line["group"]: line["methods"] for line in rest}
        note(f"{self.path}: going on after {len(self.done)} groups of prompts")

    def write(self, group: int, methods: Mapping[str, Any]) -> None:
        """Keep a finished group."""
        self._file.write({"group": group, "methods": methods})
        self._file.sync()

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write the results file; what was kept on the way is no longer needed."""
        write_json(self.out, results)
        self._file.close()
        self.path.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
