"""`deepspec recommend`: acceptance from every source, throughput, the ranking, and what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from deepspec.cli import app
from deepspec.cost import acceptance
from deepspec.cost.acceptance import Acceptance, flat, from_counters, from_results, published, thresholds
from deepspec.cost.recommend import Load, beyond, break_even, choices, rehearsal, tokens_per_second
from deepspec.errors import DataError, MismatchError
from deepspec.schedule.costs import Identity, StepCosts, write_costs
from deepspec.this_machine import this_machine
from standin import StandIn

SURVIVAL = (0.8, 0.6, 0.4)


def costs(**changes: Any) -> StepCosts:
    """A pass of 10 ms and 1 ms for each token, proposals of 5 ms, prompts of 1 ms a token."""
    rows, widths, contexts = np.array([1, 8, 32]), np.array([1, 2, 4]), np.array([64, 256])
    target = 0.01 + 0.001 * rows[:, None, None] * widths[None, :, None] + 0.0 * contexts
    found = StepCosts(
        rows, widths, contexts, target, np.full((3, 2), 0.005), np.array([0, 100]), np.array([0.0, 0.1]),
        np.zeros(3), Identity("m", block=3),
    )  # fmt: skip
    return replace(found, **changes)


def simulated(table: StepCosts, load: Load, length: int, survival: tuple[float, ...]) -> float:
    """Tokens per second of a closed loop, request after request, with the mean acceptance in every round."""
    each, now, done = 1 + sum(survival[:length]), 0.0, 0
    reading = float(table.prefill_seconds(load.prompt, length > 0))
    seconds = [
        float(table.round_seconds(n, n * (1 + length), 100, length > 0)) for n in range(load.users + 1)
    ]
    left: list[float] = []
    begin_tokens = begin = 0.0
    tokens = 0.0
    for step in range(40_000):
        if len(left) < load.users:
            now += reading
            # Users who all began at the same time would end together.
            left.append((load.answer - 1) * (1 if done else (len(left) + 1) / load.users))
            tokens += 1
        else:
            now += seconds[len(left)]
            tokens += sum(min(each, x) for x in left)
            done += sum(x <= each for x in left)
            left = [x - each for x in left if x > each]
        if step == 4000:
            begin, begin_tokens = now, tokens
    return (tokens - begin_tokens) / (now - begin)


@pytest.mark.parametrize("users", [1, 8, 32])
@pytest.mark.parametrize("length", [0, 1, 3])
def test_throughput_is_that_of_a_closed_loop_played_through(users: int, length: int) -> None:
    load = Load(users, 20, 400)
    # A last round gives more than an answer takes; half a round is lost on average.
    lost = sum(SURVIVAL[:length]) / 2
    found = tokens_per_second(costs(), load, length, sum(SURVIVAL[:length]), lost)
    assert found == pytest.approx(simulated(costs(), load, length, SURVIVAL), rel=0.02)


def test_speculation_wins_where_rows_are_few_and_loses_where_tokens_are_dear() -> None:
    accepted = Acceptance(SURVIVAL, "told")
    assert choices(costs(), accepted, Load(1, 10, 100))[0].name == "fixed:3"
    assert choices(costs(), accepted, Load(32, 10, 100))[0].name == "none"
    cells = {(c.rows, c.context): c for c in break_even(costs(), accepted)}
    assert cells[1, 64].length == 3 and cells[1, 64].speedup == pytest.approx(2.8 / 19 * 11)
    assert cells[32, 64].length == 0 and cells[32, 64].speedup == 1.0


def test_a_draft_that_is_never_accepted_is_not_recommended() -> None:
    for users in (1, 8, 32):
        assert choices(costs(), Acceptance((0.0, 0.0, 0.0), "told"), Load(users, 10, 100))[0].name == "none"


def test_choices_below_the_least_speed_come_last_and_energy_is_power_over_speed() -> None:
    found = choices(costs(), Acceptance(SURVIVAL, "told"), Load(8, 10, 100), watts=100, price=0.36, least=30)
    assert [c.pays for c in found] == sorted((c.pays for c in found), reverse=True)
    for choice in found:
        assert choice.pays == (choice.per_user >= 30)
        assert choice.joules == pytest.approx(100 / choice.tokens_per_s)
        assert choice.cost == pytest.approx(choice.joules * 1e6 / 3.6e6 * 0.36)


def test_intervals_come_from_those_of_the_acceptance() -> None:
    load = Load(1, 10, 100)
    (found,) = [
        c for c in choices(costs(), Acceptance(SURVIVAL, "told", 0.9, 1.2), load) if c.name == "fixed:2"
    ]
    assert found.low == tokens_per_second(costs(), load, 2, 1.4 * 0.9)
    assert found.high == tokens_per_second(costs(), load, 2, 1.4 * 1.2)
    plain = next(
        c for c in choices(costs(), Acceptance(SURVIVAL, "told", 0.9, 1.2), load) if c.name == "none"
    )
    assert plain.low == plain.tokens_per_s == plain.high


def test_a_schedule_that_verifies_the_likely_tokens_beats_every_fixed_length() -> None:
    found = choices(
        costs(), Acceptance(SURVIVAL, "told"), Load(8, 10, 100), scheduled=[(1.8, 1.7), (3.0, 1.8)]
    )
    assert found[0].name == "scheduled" and (found[0].verified, found[0].accepted) == (1.8, 1.7)


def test_loads_beyond_the_table_are_said_to_be() -> None:
    assert beyond(costs(), Load(32, 100, 200)) == []
    assert len(beyond(costs(), Load(33, 200, 200))) == 2


# ── acceptance ────────────────────────────────────────────────────────────────────────────────────────


def evaluated(tmp_path: Path, **changes: Any) -> Path:
    overall = {
        "prompts": 4, "tokens": 100, "rounds": 40, "survival": list(SURVIVAL),
        "tau": {"value": 2.7, "low": 2.5, "high": 3.0},
    } | changes  # fmt: skip
    conditions = {"target": "t", "target_hash": "h", "temperature": 0.0}
    conditions |= {"policy": overall.pop("policy")} if "policy" in overall else {}
    row = {"method": "d", "kind": "draft", "block": 3, "overall": overall}
    plain = {"method": "plain", "kind": "plain", "block": None, "overall": {}}
    result = {
        "format": "deepspec-eval/1",
        "conditions": conditions,
        "rows": [plain, row],
    }
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(result))
    return path


def test_results_give_survival_interval_and_what_ends_of_answers_lose(tmp_path: Path) -> None:
    found = from_results(evaluated(tmp_path), "d", block=3, target_hash="h")
    assert found.survival == SURVIVAL and found.tau == pytest.approx(2.8)
    assert (found.low, found.high) == pytest.approx((1.5 / 1.7, 2.0 / 1.7))
    assert found.lost == pytest.approx(40 * (2.8 - 2.7) / 4)


@pytest.mark.parametrize(
    ("changes", "given", "error", "message"),
    [
        ({"rounds": 0}, {}, DataError, "no rounds"),
        ({"rounds": None, "tau": None, "survival": []}, {}, DataError, "no rounds"),
        ({"survival": [0.5, None, None]}, {}, DataError, "no rounds"),
        ({}, {"block": 7}, MismatchError, "proposed 3 tokens per round"),
        ({}, {"target_hash": "other"}, MismatchError, "another target"),
        ({}, {"temperature": 1.0}, DataError, "0 results at T=1"),
        ({"policy": "auto"}, {}, MismatchError, "under the policy 'auto'"),
    ],
)
def test_results_without_rounds_or_of_something_else_are_refused(
    tmp_path: Path, changes: dict[str, Any], given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        from_results(evaluated(tmp_path, **changes), "d", **({"block": 3} | given))


VLLM = """# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 60.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 40.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 300.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 120.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 50.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="0"} 30.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 40.0
vllm:spec_decode_num_accepted_tokens_per_pos_created{engine="0",model_name="m",position="1"} 1.7e+09
"""


def test_vllms_counters_are_summed_over_engines() -> None:
    found = from_counters(VLLM, "metrics", 2)
    assert found.survival == (0.8, 0.4) and "100 rounds" in found.source
    with pytest.raises(MismatchError, match="2 proposals per round"):
        from_counters(VLLM, "metrics", 7)


@pytest.mark.parametrize("layout", ["one", "list", "lines"])
def test_sglangs_histograms_are_summed_over_answers(layout: str) -> None:
    answers = [
        {"text": "a", "meta_info": {"spec_verify_ct": 4, "spec_correct_drafts_histogram": [1, 1, 2]}},
        {"text": "b", "meta_info": {"spec_verify_ct": 4, "spec_correct_drafts_histogram": [3, 1]}},
    ]
    text = {
        "one": json.dumps(answers[0], indent=1),
        "list": json.dumps(answers),
        "lines": "\n".join(map(json.dumps, answers)),
    }[layout]
    found = from_counters(text, "answers")
    assert found.survival == ((0.75, 0.5) if layout == "one" else (0.5, 0.25))
    assert found.low <= 1 <= found.high


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "vllm:spec_decode_num_drafts_total 0.0\n",
        '{"meta_info": {"spec_correct_drafts_histogram": [0, 0]}}',
    ],
)
def test_counters_without_rounds_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="no counts of speculative decoding"):
        from_counters(text, "metrics")


def test_published_acceptance_keeps_its_accepted_length_and_its_label() -> None:
    found = published("Qwen/Qwen3-4B", "dspark")
    assert found.tau == pytest.approx(sum(acceptance.PUBLISHED["tau"]["Qwen/Qwen3-4B"]["dspark"]) / 9)
    assert "published" in found.source and found.low < 1 < found.high
    assert published("Qwen/Qwen3-8B", "eagle3", ["gsm8k"]).tau == pytest.approx(5.30)
    for given in (("other", "dspark"), ("Qwen/Qwen3-4B", "dspark", ["poems"])):
        with pytest.raises(DataError, match="no acceptance is published"):
            published(*given)


def test_flat_survival_is_a_power_of_one_rate() -> None:
    rates = flat(1 + 0.5 + 0.25 + 0.125, 3)
    assert rates == pytest.approx((0.5, 0.25, 0.125))


def test_thresholds_count_what_lies_above_them() -> None:
    """Two positions in bins [count, Σp, Σy] over ten rounds."""
    bins = [[[4, 0.4, 1], [6, 5.0, 5]], [[7, 1.0, 1], [3, 2.5, 2]]]
    report = {"rounds": 10, "positions": [{"reliability": {"after": each}} for each in bins]}
    assert thresholds(report) == [pytest.approx((0.9, 0.7)), pytest.approx((2.0, 0.9))]


def test_rehearsal_rates_never_rise_and_give_the_same_accepted_length() -> None:
    settings = rehearsal(Acceptance((0.8, 0.5, 0.6), "told"), 3)
    assert settings["vllm"]["synthetic_acceptance_rates"] == [0.8, 0.5, 0.5]
    assert float(settings["sglang"]["SGLANG_SIMULATE_ACC_LEN"]) == pytest.approx(2.8)


# ── the command ───────────────────────────────────────────────────────────────────────────────────────


def call(*words: str) -> Any:
    return CliRunner().invoke(app, ["recommend", *words])


def test_the_command_answers_before_anything_is_trained() -> None:
    result = call("dspark/qwen3-4b", "--machine", "h100", "--users", "1,128", "--price", "0.3", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {row["name"] for row in found["choices"]["1"]} == {"none", *(f"fixed:{k}" for k in range(1, 8))}
    assert any("estimated" in line for line in found["notes"])
    assert "published" in found["acceptance"]["source"]
    best = found["choices"]["1"][0]["name"].removeprefix("fixed:")
    assert f'"num_speculative_tokens": {best}' in found["launch"]["1"][-1]
    result = call("dspark/qwen3-4b", "--machine", "h100", "--to", "sglang")
    assert result.exit_code == 0 and "SGLANG_SIMULATE_ACC_LEN" in result.stdout


def table_of_pocket(path: Path, **changes: Any) -> Path:
    from deepspec.targets import TargetSpec

    machine = this_machine()
    known = TargetSpec.from_pretrained("pocket")
    identity = Identity(
        machine, target="pocket", target_hash=known.config_hash, draft="pocket-dspark", block=7
    )
    write_costs(path, costs(identity=replace(identity, **changes)))
    return path


def test_the_command_reads_counters_of_a_running_server_and_says_when_not_to_speculate(
    tmp_path: Path,
) -> None:
    table = table_of_pocket(tmp_path / "costs.json")
    text = VLLM.replace('position="1"', 'position="6"')
    with StandIn() as server:
        body = text.encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        server.raw = lambda path, asked: [head + body]
        result = call("pocket-dspark", "--costs", str(table), "--counters", server.url, "--users", "32",
                      "--prompt-tokens", "20", "--answer-tokens", "40")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "don't speculate here" in result.stdout and "vllm serve" in result.stdout
    assert "--speculative-config" not in result.stdout


@pytest.mark.parametrize(
    ("changes", "words", "message"),
    [
        ({"machine": "another"}, (), "another machine"),
        ({"target_hash": "another"}, (), "another target"),
        ({"block": 3}, (), "γ = 3"),
        ({}, ("--prompt-tokens", "1000", "--answer-tokens", "100"), "more than the 1024"),
        ({}, ("--machine", "h100"), "give one of them"),
        ({}, ("--users", "8,1"), "rising list"),
        ({}, ("--results", "a.json", "--counters", "b.txt"), "both give the acceptance"),
        ({}, ("--counters", "missing.txt"), "cannot be read"),
        ({}, (), "no acceptance is published for dspark on pocket"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...], message: str
) -> None:
    table = table_of_pocket(tmp_path / "costs.json", **changes)
    result = call("pocket-dspark", "--costs", str(table), *words)
    assert result.exit_code == 2 and message in result.output.replace("\n", " "), result.output


def test_a_table_of_another_machine_is_read_if_that_is_said(tmp_path: Path) -> None:
    table = table_of_pocket(tmp_path / "costs.json", machine="another")
    metrics = tmp_path / "metrics.txt"
    metrics.write_text(VLLM.replace('position="1"', 'position="6"'))
    words = ("pocket-dspark", "--costs", str(table), "--counters", str(metrics))
    assert call(*words, "--elsewhere").exit_code == 0


def test_machines_without_a_row_and_missing_costs_name_the_way_out() -> None:
    assert "did you mean h100" in call("dspark/qwen3-4b", "--machine", "h10").output.replace("\n", " ")
    assert "deepspec profile" in call("dspark/qwen3-4b").output


def test_a_calibration_of_another_draft_is_refused(tmp_path: Path) -> None:
    bins = [{"reliability": {"after": [[4, 0.4, 1], [6, 5.0, 5]]}}] * 7
    report = {"rounds": 10, "positions": bins, "block": 7, "draft": "d", "conditions": {"draft_hash": "a"}}
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(report))
    assert acceptance.read_calibration(path, "a", 7)["rounds"] == 10
    for given in (("b", 7), ("a", 3)):
        with pytest.raises(MismatchError, match="another draft"):
            acceptance.read_calibration(path, *given)
    for text in ("{}", "[]", json.dumps(report | {"positions": []}), json.dumps(report | {"rounds": 0})):
        path.write_text(text)
        with pytest.raises(DataError, match="not a report"):
            acceptance.read_calibration(path, "a", 7)


def test_estimates_rise_with_every_axis() -> None:
    from deepspec.cost.dimensions import PUBLISHED_TARGETS, target_dimensions
    from deepspec.cost.estimate import estimated
    from deepspec.cost.machines import MACHINES

    names = target_dimensions(PUBLISHED_TARGETS["Qwen/Qwen3-4B"]) | {"own": 1e9, "draft_width": 2}
    found = estimated(MACHINES["h100"], names, target="t", draft="d", block=7, passes=1)
    assert asdict(found.identity)["source"] == "estimate" and "estimated" in found.notes[0]
    assert all((np.diff(found.target, axis=axis) >= 0).all() for axis in range(3))
    assert found.propose is not None and (np.diff(found.propose, axis=0) >= 0).all()
    # One row reads every weight once: 8 GB at 0.6 × 3.35 TB/s.
    assert found.target[0, 0, 0] == pytest.approx(names["parameters"] * 2 / (0.6 * 3.35e12), rel=0.05)
