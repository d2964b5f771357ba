"""Results (docs/results.md) and metrics as they are read, and the words for what is in them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from deepspec.errors import DataError

Result = dict[str, Any]  # one results file: conventions, conditions, rows
Row = dict[str, Any]  # one method within it

FORMAT = "deepspec-eval/1"
MISSING = "–"
CONDITION_NAMES = {
    "template_hash": "chat template",
    "top_k": "top-k",
    "top_p": "top-p",
    "max_new_tokens": "token budget per prompt",
    "ignore_eos": "stop tokens ignored",
    "date": "date in the prompts",
    "dtype": "number format",
    "threads": "CPU threads",
    "batch": "batch size",
}
"""Names for people of the conditions whose key is not their name already."""


def read_results(path: Path) -> list[Result]:
    """The results of a file: one object, or the array that `deepspec eval --json` prints for several
    temperatures. Raises DataError."""
    next_step = "give a file that `deepspec eval --out FILE.json` wrote"
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else f"not JSON: {error}"
        raise DataError(f"the results cannot be read: {why}", where=str(path), next_step=next_step) from error
    results = found if isinstance(found, list) else [found]
    if not all(isinstance(result, dict) and result.get("format") == FORMAT for result in results):
        raise DataError(
            f"this is not a results file: its format is not {FORMAT!r}", where=str(path), next_step=next_step
        )
    return results


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; none if there is no such file, as for a packaged draft. Raises
    DataError."""
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines() if path.exists() else [], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"malformed JSON: {error}", where=f"{path}:{number}") from error
    return rows


def is_number(value: Any) -> TypeGuard[float]:
    """Whether the value is a finite number (a bool is not)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 2) -> str:
    """The value with `digits` decimals; a dash for anything that is not a finite number."""
    return f"{value:.{digits}f}" if is_number(value) else MISSING


def estimate(value: Mapping[str, Any] | None, suffix: str = "") -> tuple[str, str]:
    """An estimate as ("1.92×", "[1.85, 2.01]"). The second is empty without an interval, or if the interval
    has no width, as over a single prompt: it would look exact although nothing is known."""
    if not value or not is_number(value.get("value")):
        return MISSING, ""
    low, high = value.get("low"), value.get("high")
    interval = f"[{number(low)}, {number(high)}]" if is_number(low) and is_number(high) and low < high else ""
    return number(value["value"]) + suffix, interval


def rows_of(result: Result) -> list[Row]:
    """The rows of a results file, one per method."""
    return list(result.get("rows") or [])


def is_greedy(conditions: Mapping[str, Any]) -> bool:
    return conditions.get("temperature") == 0


def sampling_label(conditions: Mapping[str, Any]) -> str:
    """The sampling settings in words, leaving out those that are switched off."""
    temperature = conditions.get("temperature")
    words = [f"temperature {temperature:g}" if is_number(temperature) else "temperature not recorded"]
    if conditions.get("top_k"):
        words.append(f"top-k {conditions['top_k']}")
    if is_number(conditions.get("top_p")) and conditions["top_p"] < 1:
        words.append(f"top-p {conditions['top_p']:g}")
    return ", ".join(words)


def condition_labels(results: Sequence[Result]) -> list[str]:
    """A distinct label for each results file: the sampling, thinking if it varies, and a number if all else
    is equal."""
    conditions = [result.get("conditions") or {} for result in results]
    labels = [sampling_label(each) for each in conditions]
    if len({each.get("thinking") for each in conditions}) > 1:
        modes = ["thinking" if each.get("thinking") else "not thinking" for each in conditions]
        labels = [f"{label}, {mode}" for label, mode in zip(labels, modes, strict=True)]
    return [
        f"{label} (run {labels[: index + 1].count(label)})" if labels.count(label) > 1 else label
        for index, label in enumerate(labels)
    ]


def lossless_finding(row: Row, conditions: Mapping[str, Any]) -> tuple[str, str]:
    """(state, cell text) of the lossless check.

    state is "identical" only if all prompts, and at least one, matched token for token at temperature 0;
    otherwise "near-ties" (all differences were ties within rounding), "different", "unchecked", "sampled"
    (above temperature 0 outputs are random and cannot be compared token for token) or "baseline".
    """
    if row.get("kind") == "plain" or (row.get("kind") == "generate" and not row.get("lossless")):
        return "baseline", MISSING
    if not is_greedy(conditions):
        return "sampled", "by the rule"
    check = row.get("lossless") or {}
    identical, prompts, ties = (check.get(name) or 0 for name in ("identical", "prompts", "near_ties"))
    if not prompts:
        return "unchecked", "not checked"
    text = f"{identical}/{prompts} identical"
    if identical == prompts:
        return "identical", text
    if ties:
        text += f", {ties} near-tie" + ("s" if ties > 1 else "")
    return ("near-ties" if identical + ties >= prompts else "different"), text


def condition_name(key: str) -> str:
    return CONDITION_NAMES.get(key, key.replace("_", " "))
