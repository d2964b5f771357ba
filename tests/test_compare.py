"""compare: refuses what cannot be compared, and pairs what can by prompt."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from deepspec.errors import DataError, UserError
from deepspec.report import results as results_room
from deepspec.report.compare import REFUSED, WARNED, compare_results, condition_differences
from deepspec.report.results import condition_labels, estimate, lossless_finding

CONDITIONS = {
    "target": "pocket",
    "target_hash": "t1",
    "thinking": False,
    "template_hash": "c1",
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "date": "2025-01-01",
    "prompts_hash": "p1",
    "prompts": 4,
    "max_new_tokens": 48,
    "acceptance_rule": "rejection sampling",
    "policy": "all",
    "ignore_eos": False,
    "seed": 0,
    "dtype": "float32",
    "device": "cpu",
    "threads": 2,
    "batch": 1,
}
CHANGED = {
    "target_hash": "t2",
    "thinking": True,
    "template_hash": "c2",
    "temperature": 1.0,
    "top_k": 20,
    "top_p": 0.9,
    "date": "2026-07-03",
    "prompts_hash": "p2",
    "max_new_tokens": 64,
    "acceptance_rule": "exact match",
    "policy": "threshold:0.5",
    "ignore_eos": True,
    "dtype": "bfloat16",
    "device": "cuda",
    "threads": 8,
    "batch": 4,
}


def prompt(name: str, kept: int, rounds: int, domain: str = "math") -> dict:
    return {"id": name, "domain": domain, "tokens": kept + 1, "rounds": rounds, "kept": kept, "seconds": 1.0}


def row(method: str, *prompts: dict, tau: float | None = 2.0) -> dict:
    estimate = None if tau is None else {"value": tau, "low": tau, "high": tau}
    return {"method": method, "kind": "draft", "overall": {"tau": estimate}, "per_prompt": list(prompts)}


def results(*rows: dict, **changes: object) -> dict:
    return {"format": "deepspec-eval/1", "conditions": CONDITIONS | changes, "rows": list(rows)}


def test_every_condition_of_the_agreement_is_looked_at():
    assert set(REFUSED) | set(WARNED) == set(CHANGED)
    assert not set(REFUSED) & set(WARNED)


def problems(a: dict, b: dict, names: tuple[str, ...] = (*REFUSED, *WARNED)) -> list[str]:
    return condition_differences("one", a, "two", b, names)


@pytest.mark.parametrize("name", CHANGED)
def test_one_changed_condition_gives_one_sentence_naming_both_sides(name):
    other = CONDITIONS | {name: CHANGED[name]}
    (sentence,) = problems(CONDITIONS, other)
    one, two = sentence.split(", but two ")
    assert one.startswith("one was measured with")
    for words, side in ((one, CONDITIONS[name]), (two, CHANGED[name])):
        expected = ("without", "with ")[side] if isinstance(side, bool) else str(side)
        assert expected in words
    assert problems(CONDITIONS, other, REFUSED) == ([sentence] if name in REFUSED else [])
    assert problems(CONDITIONS, other, WARNED) == ([] if name in REFUSED else [sentence])


def test_results_that_record_no_policy_were_measured_with_all_proposals():
    before = {name: value for name, value in CONDITIONS.items() if name != "policy"}
    assert problems(before, CONDITIONS) == []


def test_equal_conditions_have_no_problem_and_the_seed_is_none():
    assert problems(CONDITIONS, CONDITIONS | {"seed": 7}) == []


def test_a_condition_that_one_side_does_not_record_is_not_taken_for_equal():
    partial = {name: value for name, value in CONDITIONS.items() if name != "thinking"}
    assert problems(CONDITIONS, partial) == [
        "one was measured without thinking, but two with thinking not recorded"
    ]


def test_another_target_is_named_and_not_only_hashed():
    (sentence,) = problems(CONDITIONS, CONDITIONS | {"target_hash": "t2", "target": "other-model"})
    assert "pocket (t1)" in sentence
    assert "other-model (t2)" in sentence


def test_mismatched_files_are_refused_with_every_reason_and_a_way_on():
    files = [results(row("a", prompt("1", 4, 2))), results(row("b", prompt("1", 4, 2)), top_p=0.9, top_k=20)]
    with pytest.raises(
        UserError,
        match=r"with top-k 0, but file 2 with top-k 20[\s\S]*with top-p 1\.0, but file 2 with top-p 0\.9",
    ) as caught:
        compare_results(files, allow_mismatch=False)
    assert "--allow-mismatch" in str(caught.value)


def test_allowed_mismatches_are_still_listed():
    files = [results(row("a", prompt("1", 4, 2))), results(row("b", prompt("1", 4, 2)), top_k=20, threads=8)]
    outcome = compare_results(files, allow_mismatch=True)
    assert outcome["refusals"] == ["file 1 was measured with top-k 0, but file 2 with top-k 20"]
    assert outcome["warnings"] == ["file 1 was measured with CPU threads 2, but file 2 with CPU threads 8"]


def test_the_third_file_is_checked_too():
    files = [results(row(name, prompt("1", 4, 2))) for name in "ab"]
    with pytest.raises(UserError, match="file 1 was measured with top-k 0, but file 3 with top-k 5"):
        compare_results([*files, results(row("c", prompt("1", 4, 2)), top_k=5)])


def test_tau_is_pooled_and_the_difference_is_second_minus_first():
    a = row("a", prompt("1", 4, 2), prompt("2", 6, 6))
    b = row("b", prompt("1", 4, 1), prompt("2", 6, 3))
    (pair,) = compare_results([results(a, b)])["comparisons"]
    assert (pair["a"], pair["b"], pair["prompts"], pair["left_out"]) == ("a", "b", 2, 0)
    assert (pair["tau_a"], pair["tau_b"]) == (10 / 8, 10 / 4)  # means of per-prompt ratios: 1.5 and 3.0
    assert pair["difference"]["value"] == 1.25
    assert 0 < pair["difference"]["low"] <= 1.25 <= pair["difference"]["high"]


def test_prompts_are_paired_by_id_and_not_by_order():
    # τ differs widely between prompts but by exactly 1 on each: only a paired interval is [1, 1].
    taus = {"1": 1, "2": 2, "3": 5, "4": 9}
    a = row("a", *(prompt(name, 10 * tau, 10) for name, tau in taus.items()))
    b = row("b", *(prompt(name, 10 * (tau + 1), 10) for name, tau in reversed(taus.items())))
    (pair,) = compare_results([results(a, b)])["comparisons"]
    assert [pair["difference"][name] for name in ("value", "low", "high")] == pytest.approx(
        [1, 1, 1], abs=1e-12
    )


def test_the_same_id_in_two_domains_is_two_prompts():
    rows = [row(name, prompt("1", 4, 2), prompt("1", 9, 3, "code")) for name in "ab"]
    (pair,) = compare_results([results(*rows)])["comparisons"]
    assert pair["prompts"] == 2
    assert {name: each["tau_a"] for name, each in pair["domains"].items()} == {"math": 2.0, "code": 3.0}


def test_prompts_that_only_one_side_has_are_left_out_and_counted():
    a = row("a", prompt("1", 4, 2), prompt("2", 100, 1))
    b = row("b", prompt("1", 6, 2), prompt("3", 100, 1))
    (pair,) = compare_results([results(a, b)])["comparisons"]
    assert (pair["tau_a"], pair["tau_b"], pair["prompts"], pair["left_out"]) == (2.0, 3.0, 1, 2)


def test_plain_rows_take_no_part_and_equal_methods_are_told_apart_by_file():
    plain = row("plain", prompt("1", 0, 0), tau=None)
    files = [results(plain, row("d", prompt("1", 4, 2))), results(plain, row("d", prompt("1", 6, 2)))]
    (pair,) = compare_results(files)["comparisons"]
    assert (pair["a"], pair["b"]) == ("d (file 1)", "d (file 2)")


def test_three_rows_make_three_pairs():
    rows = [row(name, prompt("1", 4, 2)) for name in "abc"]
    pairs = [(pair["a"], pair["b"]) for pair in compare_results([results(*rows)])["comparisons"]]
    assert pairs == [("a", "b"), ("a", "c"), ("b", "c")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([results(row("a", prompt("1", 4, 2)))], "only 1 .* a comparison needs two"),
        ([results(row("a"), row("b"))], "a has no per-prompt counts"),
        ([results(row("a", prompt("1", 4, 2)), row("b", prompt("2", 4, 2)))], "no prompt in common"),
        ([results(row("a", prompt("1", 4, 2), prompt("1", 4, 2)), row("b"))], "lists prompt '1'"),
    ],
)
def test_what_cannot_be_paired_is_an_error_that_says_why(files, message):
    with pytest.raises(DataError, match=message):
        compare_results(files)


def test_reading_results_needs_only_the_standard_library_and_errors():
    """So that `deepspec report` does not wait for torch."""
    tree = ast.parse(Path(results_room.__file__).read_text(encoding="utf-8"))
    modules = {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in tree.body if isinstance(node, ast.Import) for name in node.names}
    assert {name for name in modules if name.split(".")[0] not in sys.stdlib_module_names} == {
        "deepspec.errors"
    }


def test_condition_labels_never_coincide():
    files = [results(), results(thinking=True), results(thinking=True), results(temperature=1.0, top_p=0.9)]
    labels = condition_labels(files)
    assert labels[0] == "temperature 0, not thinking"
    assert labels[3] == "temperature 1, top-p 0.9, not thinking"
    assert labels[1:3] == [f"temperature 0, thinking (run {n})" for n in (1, 2)]


def test_an_interval_over_one_prompt_is_not_shown():
    assert estimate({"value": 2.0, "low": 2.0, "high": 2.0}, "×") == ("2.00×", "")
    assert estimate({"value": 2.0, "low": 1.5, "high": 2.5}, "×") == ("2.00×", "[1.50, 2.50]")


@pytest.mark.parametrize(
    ("check", "state"),
    [
        ({"identical": 5, "prompts": 5, "near_ties": 0}, "identical"),
        ({"identical": 4, "prompts": 5, "near_ties": 1}, "near-ties"),
        ({"identical": 3, "prompts": 5, "near_ties": 1}, "different"),
        ({"identical": 0, "prompts": 0, "near_ties": 0}, "unchecked"),
        (None, "unchecked"),
    ],
)
def test_lossless_means_every_one_of_some_prompts(check, state):
    draft = row("a") | {"lossless": check}
    assert lossless_finding(draft, CONDITIONS)[0] == state
    assert lossless_finding(draft, CONDITIONS | {"temperature": 1.0})[0] == "sampled"
