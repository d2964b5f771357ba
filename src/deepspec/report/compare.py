"""What two evaluations may be set beside each other for, and what setting them there shows.

Accepted lengths measured under different sampling, prompts or templates are different quantities, so
`compare_results` refuses them unless told otherwise. The words for figures, conditions and the lossless check
live here too, because the report must say the same things. Standard library only (the bootstrap itself is
`deepspec.maths.acceptance`, imported when it is needed).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, TypeGuard

from deepspec.errors import DataError, UserError

Result = dict[str, Any]  # one results file: conventions, conditions, rows
Row = dict[str, Any]  # one method within it
PromptKey = tuple[str, str]  # domain, id

FORMAT = "deepspec-eval/1"
MISSING = "–"
BOOTSTRAP_SEED = 0

# Conditions that make two accepted lengths different quantities, and those that only make speeds differ.
REFUSED = (
    "thinking",
    "template_hash",
    "temperature",
    "top_k",
    "top_p",
    "prompts_hash",
    "max_new_tokens",
    "ignore_eos",
    "acceptance_rule",
    "target_hash",
)
WARNED = ("dtype", "device", "threads", "batch")
CONDITION_NAMES = {
    "target": "Target",
    "target_hash": "Target hash",
    "thinking": "Thinking mode",
    "template_hash": "Chat template hash",
    "system_prompt": "System prompt hash",
    "temperature": "Temperature",
    "top_k": "Top-k",
    "top_p": "Top-p",
    "prompts_hash": "Prompts hash",
    "prompts": "Prompts",
    "max_new_tokens": "New tokens per prompt, at most",
    "acceptance_rule": "Acceptance rule",
    "ignore_eos": "Stop tokens ignored",
    "seed": "Seed",
    "dtype": "Number format",
    "device": "Device",
    "threads": "CPU threads",
    "batch": "Batch",
}


MODE = {"thinking": "thinking", "template_hash": "chat template", "system_prompt": "system prompt"}
"""What a draft's acceptance hangs on beside the target itself: trained one way and used another, it proposes
what the target no longer says."""


def mode_differences(one: str, have: Mapping[str, Any], other: str, want: Mapping[str, Any]) -> list[str]:
    """A sentence for each fact of MODE that both sides state differently: "<one> with … and <other> with …".

    A side that lacks a fact says nothing of it; so does None, except for a system prompt, where it is "none".
    """
    sentences = []
    for key, label in MODE.items():
        stated = all(
            key in side and (side[key] is not None or key == "system_prompt") for side in (have, want)
        )
        if stated and have[key] != want[key]:
            a, b = (_spelled(side[key]) for side in (have, want))
            sentences.append(f"{one} with {label} {a} and {other} with {label} {b}")
    return sentences


def _spelled(value: Any) -> str:
    words = {True: "on", False: "off", None: "none"}
    return words[value] if value in words else str(value)[:12]


def is_number(value: Any) -> TypeGuard[float]:
    """Whether the value is a finite number (a bool is not)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 2) -> str:
    """The value with `digits` decimals; a dash for anything that is not a finite number."""
    return f"{value:.{digits}f}" if is_number(value) else MISSING


def estimate(value: Mapping[str, Any] | None, suffix: str = "") -> tuple[str, str]:
    """An estimate as ("1.92×", "[1.85, 2.01]"); the second is empty without an interval."""
    if not value or not is_number(value.get("value")):
        return MISSING, ""
    low, high = value.get("low"), value.get("high")
    interval = f"[{number(low)}, {number(high)}]" if is_number(low) and is_number(high) else ""
    return number(value["value"]) + suffix, interval


def value_of(row: Row, name: str) -> float | None:
    """The overall estimate `name` ("speedup", "tau") of a row, or None."""
    found = (row.get("overall") or {}).get(name) or {}
    return found["value"] if is_number(found.get("value")) else None


def rows_of(result: Result) -> list[Row]:
    return list(result.get("rows") or [])


def drafts_of(result: Result) -> list[Row]:
    return [row for row in rows_of(result) if row.get("kind") == "draft"]


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
    """One distinct label per results file: sampling, then thinking where it varies, then a number."""
    conditions = [result.get("conditions") or {} for result in results]
    labels = [sampling_label(each) for each in conditions]
    if len({each.get("thinking") for each in conditions}) > 1:
        modes = ["thinking" if each.get("thinking") else "not thinking" for each in conditions]
        labels = [f"{label}, {mode}" for label, mode in zip(labels, modes, strict=True)]
    seen: dict[str, int] = {}
    for index, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        if labels.count(label) > 1:
            labels[index] = f"{label} (run {seen[label]})"
    return labels


def lossless_finding(row: Row, conditions: Mapping[str, Any]) -> tuple[str, str]:
    """(state, cell text) of the lossless check.

    state is "identical" only when every one of at least one prompt matched token for token at
    temperature 0; otherwise "near-ties" (all differences were ties within rounding), "different",
    "unchecked", "sampled" (temperature above 0: outputs are random, so nothing can be compared token for
    token) or "baseline".
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


def lossless_sentence(row: Row, conditions: Mapping[str, Any], name: str) -> str:
    """What the check established about this row, as a sentence."""
    state, _ = lossless_finding(row, conditions)
    check = row.get("lossless") or {}
    identical, prompts = check.get("identical") or 0, check.get("prompts") or 0
    if state == "identical":
        return f"{name}: identical to plain greedy decoding, token for token, on all {prompts} prompts."
    if state == "near-ties":
        return (
            f"{name}: identical on {identical} of {prompts} prompts. On the other {prompts - identical} the "
            "outputs part where the target's two best tokens tie within rounding; that is an explanation, "
            "not a proof that nothing changed."
        )
    if state == "different":
        return f"{name}: NOT identical to plain greedy decoding: {identical} of {prompts} prompts match."
    if state == "sampled":
        return f"{name}: not compared token for token, because outputs at this temperature are random."
    return f"{name}: not compared with plain decoding in this run."


def shown_condition(value: Any) -> str:
    """A condition's value for people: yes and no for switches, words for what is absent."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not recorded" if value is None else str(value)


def conditions_table(results: Sequence[Result]) -> list[tuple[str, list[str]]]:
    """(name, one value per results file) for every condition that any file records."""
    recorded = [result.get("conditions") or {} for result in results]
    names = dict.fromkeys([*CONDITION_NAMES, *(name for each in recorded for name in each)])

    return [
        (CONDITION_NAMES.get(name, name), [shown_condition(each.get(name)) for each in recorded])
        for name in names
        if any(name in each for each in recorded)
    ]


# ------------------------------------------------------------------------------------------- comparing


def condition_differences(a: Mapping[str, Any], b: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """A sentence, naming both sides, for every one of `names` that differs."""
    sentences = []
    for name in names:
        if a.get(name) == b.get(name):
            continue
        left, right = shown_condition(a.get(name)), shown_condition(b.get(name))
        if name == "target_hash":
            left, right = f"{a.get('target')} ({left})", f"{b.get('target')} ({right})"
        sentences.append(f"{CONDITION_NAMES[name]} differs: {left} in the first, {right} in the second.")
    return sentences


def comparison_refusals(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The differences between two `conditions` under which accepted lengths must not be compared."""
    return condition_differences(a, b, REFUSED)


def comparison_warnings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The differences that leave accepted lengths comparable, or nearly, but not speeds."""
    return condition_differences(a, b, WARNED)


def comparison_problems(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """All differences that matter between two `conditions`: the refusals first, then the warnings."""
    return comparison_refusals(a, b) + comparison_warnings(a, b)


def prompt_counts(row: Row, where: str) -> dict[PromptKey, tuple[int, int]]:
    """(kept, rounds) of every prompt of a row; DataError when they are not recorded or an id repeats."""
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

    A figure is None where there are no rounds to take it from.
    """
    from deepspec.maths.acceptance import paired_bootstrap_difference  # torch, which refusing does not need

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
    """One comparison of two named rows, over the prompts they share, as a whole and by domain."""
    (name_a, row_a), (name_b, row_b) = a, b
    counts_a, counts_b = prompt_counts(row_a, name_a), prompt_counts(row_b, name_b)
    shared = [key for key in counts_a if key in counts_b]
    if not shared:
        raise DataError(f"{name_a} and {name_b} have no prompt in common")
    domains = dict.fromkeys(domain for domain, _ in shared)
    return {
        "a": name_a,
        "b": name_b,
        "left_out": len(counts_a.keys() ^ counts_b.keys()),
        **paired_difference(counts_a, counts_b, shared),
        "domains": {
            name: paired_difference(counts_a, counts_b, [key for key in shared if key[0] == name])
            for name in domains
        },
    }


def compare_results(files: Sequence[Result], allow_mismatch: bool = False) -> dict[str, Any]:
    """Paired differences in τ between all speculative rows of one or more results files.

    Every pair of rows that count verify rounds is compared in the order given, `difference` being
    τ(b) - τ(a) over the prompts both have, with a 95% interval from a bootstrap that draws prompts. A row is
    called by its method, and by file number too when there are several files.

    Returns {"refusals": [...], "warnings": [...], "comparisons": [{"a", "b", "prompts", "left_out", "tau_a",
    "tau_b", "difference": {"value", "low", "high"} or None, "domains": {name: the same}}]}, where `left_out`
    counts prompts that only one of the two has.

    Raises UserError when conditions differ in a way that makes the figures different quantities, unless
    `allow_mismatch`; DataError for a file of another format or without per-prompt counts.
    """
    for number, file in enumerate(files, start=1):
        if file.get("format") != FORMAT:
            raise DataError(
                f"file {number} is not a results file: its format is {file.get('format')!r}, not {FORMAT!r}",
                next_step="give the JSON files that deepspec eval wrote",
            )
    conditions = [file.get("conditions") or {} for file in files]
    refusals, warnings = [], []
    for number, other in enumerate(conditions[1:], start=2):
        prefix = f"Files 1 and {number}: " if len(files) > 2 else ""
        refusals += [prefix + sentence for sentence in comparison_refusals(conditions[0], other)]
        warnings += [prefix + sentence for sentence in comparison_warnings(conditions[0], other)]
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
        raise DataError(f"there are {len(rows)} rows with an accepted length; comparing takes two")
    pairs = [compared_pair(a, b) for a, b in combinations(rows, 2)]
    return {"refusals": refusals, "warnings": warnings, "comparisons": pairs}
