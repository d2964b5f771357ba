"""Comparing results: what may be compared, and paired differences in accepted length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from deepspec.conditions import UNRECORDED, contrast
from deepspec.errors import DataError, UserError
from deepspec.maths.acceptance import paired_bootstrap_difference
from deepspec.report.results import Result, Row, condition_name

PromptKey = tuple[str, str]  # domain, id

BOOTSTRAP_SEED = 0
REFUSED = (
    "thinking",
    "template_hash",
    "temperature",
    "top_k",
    "top_p",
    "date",
    "prompts_hash",
    "max_new_tokens",
    "ignore_eos",
    "acceptance_rule",
    "policy",
    "target_hash",
)
"""Conditions that make two accepted lengths different quantities."""
BEFORE = {"policy": "all"}
"""What held before results files recorded it."""
WARNED = ("dtype", "device", "threads", "batch")
"""Conditions that leave accepted lengths comparable, or nearly, but not speeds."""


def condition_differences(
    one: str, a: Mapping[str, Any], other: str, b: Mapping[str, Any], names: Sequence[str]
) -> list[str]:
    """A sentence for each of `names` that differs between two `conditions`. One that only one side records
    differs too."""

    a, b = BEFORE | dict(a), BEFORE | dict(b)

    def value(conditions: Mapping[str, Any], key: str) -> Any:
        found = UNRECORDED if conditions.get(key) is None else conditions[key]
        return f"{conditions.get('target')} ({found})" if key == "target_hash" else found

    return [
        contrast(condition_name(key), f"{one} was measured", value(a, key), other, value(b, key))
        for key in names
        if a.get(key) != b.get(key)
    ]


def prompt_counts(row: Row, where: str) -> dict[PromptKey, tuple[int, int]]:
    """(tokens kept, verify rounds) of every prompt of a row. Raises DataError if they are not recorded, or if
    an id repeats."""
    records = row.get("per_prompt")
    if not records:
        raise DataError(
            f"{where} has no per-prompt counts, without which nothing can be paired",
            next_step="run deepspec eval again and compare the new file",
        )
    counts = {}
    for record in records:
        key = (str(record["domain"]), str(record["id"]))
        if key in counts:
            raise DataError(f"{where} lists prompt {key[1]!r} of domain {key[0]!r} twice")
        counts[key] = (int(record["kept"]), int(record["rounds"]))
    return counts


def paired_difference(
    a: Mapping[PromptKey, tuple[int, int]], b: Mapping[PromptKey, tuple[int, int]], keys: Sequence[PromptKey]
) -> dict[str, Any]:
    """Pooled τ of both on the prompts `keys`, and their difference b - a with its 95% paired interval.

    A figure is None if there are no rounds to compute it from.
    """
    kept_a, rounds_a = [a[key][0] for key in keys], [a[key][1] for key in keys]
    kept_b, rounds_b = [b[key][0] for key in keys], [b[key][1] for key in keys]
    difference = paired_bootstrap_difference((kept_b, rounds_b), (kept_a, rounds_a), seed=BOOTSTRAP_SEED)
    return {
        "prompts": len(keys),
        "tau_a": sum(kept_a) / sum(rounds_a) if sum(rounds_a) else None,
        "tau_b": sum(kept_b) / sum(rounds_b) if sum(rounds_b) else None,
        "difference": difference._asdict() if difference else None,
    }


def compared_pair(a: tuple[str, Row], b: tuple[str, Row]) -> dict[str, Any]:
    """One comparison of two named rows, over the prompts they share: as a whole and by domain what
    `paired_difference` gives, and how many prompts only one of the two has (`left_out`)."""
    (name_a, row_a), (name_b, row_b) = a, b
    counts_a, counts_b = prompt_counts(row_a, name_a), prompt_counts(row_b, name_b)
    shared = [key for key in counts_a if key in counts_b]
    if not shared:
        raise DataError(f"{name_a} and {name_b} have no prompt in common")
    return {
        "a": name_a,
        "b": name_b,
        "left_out": len(counts_a.keys() ^ counts_b.keys()),
        **paired_difference(counts_a, counts_b, shared),
        "domains": {
            name: paired_difference(counts_a, counts_b, [key for key in shared if key[0] == name])
            for name in dict.fromkeys(domain for domain, _ in shared)
        },
    }


def compare_results(files: Sequence[Result], allow_mismatch: bool = False) -> dict[str, Any]:
    """Paired differences in τ between all speculative rows of one or more results files.

    Every pair of rows that count verify rounds is compared in the order given: `difference` is τ(b) - τ(a)
    over the prompts that both have, with a 95% interval from a bootstrap that draws prompts. A row is called
    by its method, and by its file's number too if there are several files.

    Returns {"refusals": [...], "warnings": [...], "comparisons": [...]}, as `compared_pair` gives them.
    Raises UserError when conditions differ in a way that makes the figures different quantities, unless
    `allow_mismatch`; DataError for rows without per-prompt counts, or fewer than two rows.
    """
    conditions = [file.get("conditions") or {} for file in files]
    refusals, warnings = [], []
    for number, other in enumerate(conditions[1:], start=2):
        sides = "file 1", conditions[0], f"file {number}", other
        refusals += condition_differences(*sides, REFUSED)
        warnings += condition_differences(*sides, WARNED)
    if refusals and not allow_mismatch:
        raise UserError(
            "these results were measured under conditions that cannot be compared:\n"
            + "\n".join(f"  - {sentence}" for sentence in refusals),
            next_step="evaluate again under equal conditions, or pass --allow-mismatch to compare anyway",
        )
    rows = [
        (f"{row['method']} (file {number})" if len(files) > 1 else str(row["method"]), row)
        for number, file in enumerate(files, start=1)
        for row in file.get("rows") or []
        if (row.get("overall") or {}).get("tau")
    ]
    if len(rows) < 2:
        raise DataError(f"only {len(rows)} row(s) have an accepted length, and a comparison needs two")
    pairs = [compared_pair(a, b) for a, b in combinations(rows, 2)]
    return {"refusals": refusals, "warnings": warnings, "comparisons": pairs}
