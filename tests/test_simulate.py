"""Traces and the simulator: what is recorded, what a load gives, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from typer.testing import CliRunner

from conftest import prompts_of, teach, tiny_draft
from deepspec.cli import app
from deepspec.decode.engine import Request, generate
from deepspec.errors import DataError, MismatchError
from deepspec.maths.verify import Sampling
from deepspec.measure import calibrate
from deepspec.measure.rows import Prompt
from deepspec.measure.traces import Tracing
from deepspec.report.charts import write_lines
from deepspec.schedule.costs import Identity, StepCosts, write_costs
from deepspec.schedule.policies import NONE, Fixed, Load, Threshold
from deepspec.schedule.simulate import Arrivals, Oracle, Simulator, _Counts, _Row, simulated
from deepspec.schedule.traces import Traces, read_traces, write_traces
from deepspec.targets import Target

PLAIN, TOKEN, PROPOSE, READ = 1.0, 0.25, 0.5, 2.0


def costs(observe: float = 0.0, token: float = TOKEN, machine: str = "a machine") -> StepCosts:
    """A round takes PLAIN + TOKEN for each token more than one of each row, and PROPOSE if it proposes."""
    rows, widths = np.array([1, 64]), np.array([1, 5])
    line = PLAIN + token * rows[:, None] * (widths - 1)
    return StepCosts(
        rows, widths, np.array([8]), line[..., None], np.full((2, 1), PROPOSE), np.array([8]),
        np.array([READ]), np.zeros(2), Identity(machine, target_hash="t1", draft_hash="d1", block=4),
        observe=np.array([observe]),
    )  # fmt: skip


def traces(accepted: list[int], answers: int = 10, confidence: float = 0.5) -> Traces:
    """The same answer again and again: one position for each of `accepted`."""
    counts = np.array(accepted * answers)
    starts = len(accepted) * np.arange(answers + 1)
    confidences = np.full((len(counts), 4), confidence)
    return Traces(confidences, counts, starts, np.full(answers, 8), "d1", "t1", 32)


# ── what is recorded ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("algorithm", ["eagle3", "dspark"])
def test_every_position_of_an_answer_tells_what_a_round_from_there_accepts(
    targets: dict[str, Target], algorithm: str
) -> None:
    """A trace is compared with decoders that begin at each position, by their first rounds."""
    target = targets["llama"]
    prompts = prompts_of(target, (9, 5))
    plain = [g.token_ids for g in generate(target, None, prompts, 10)]
    rows = [p + g for p, g in zip(prompts, plain, strict=True)]
    draft = teach(tiny_draft(target, algorithm), target, rows, steps=12)
    requests = [Request(p, 10, key=str(i)) for i, p in enumerate(prompts)]
    found = {g.key: g for g in Tracing(target, draft, max_rows=2).run(requests)}
    seen = set()
    for i, (prompt, answer) in enumerate(zip(prompts, plain, strict=True)):
        assert found[str(i)].token_ids == answer
        assert found[str(i)].kept[:9] == [1] * 9
        for at in range(9):
            first = generate(target, draft, prompt + answer[:at], 8).accepted[0]
            assert found[str(i)].accepted[at] == first
            seen.add(first)
    assert len(seen) > 1, "a draft that always accepts the same shows nothing"


def test_calibration_writes_traces_that_are_of_this_draft(targets: dict[str, Target], tmp_path: Path) -> None:
    target, file = targets["llama"], tmp_path / "traces.json"
    draft = tiny_draft(target, "dspark")
    prompts = [Prompt(str(i), "ab"[i % 2], "", tuple(p)) for i, p in enumerate(prompts_of(target, [6] * 12))]
    report = calibrate.calibrate(
        target, draft, prompts, Sampling(1.0), max_new_tokens=16, out=tmp_path / "report.json", traces=file
    )
    found = read_traces(file, draft=calibrate.fingerprint(draft), target=target.spec.config_hash)
    assert len(found.accepted) == report["rounds"] == 12 * 15
    assert found.block == draft.max_proposals and found.longest == 6 + 16
    assert found.context == target.max_length
    halved = found.scaled([2.0] * found.block)
    np.testing.assert_allclose(np.log(1 / halved.confidences - 1), np.log(1 / found.confidences - 1) / 2)


def test_traces_of_something_else_or_too_few_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "traces.json"
    answer = {"id": "1", "prompt": 8, "logits": [[0.0, 1.0]] * 120, "accepted": [1] * 120}
    about = {"draft_hash": "d1", "target_hash": "t1", "context_length": 256}
    write_traces(file, about, [answer])
    assert read_traces(file, draft="d1", target="t1").accepted.tolist() == [1] * 120
    with pytest.raises(MismatchError, match="another draft"):
        read_traces(file, draft="d2")
    with pytest.raises(MismatchError, match="another target"):
        read_traces(file, draft="d1", target="t2")
    with pytest.raises(DataError, match="256"):
        read_traces(file).with_prompts(200)
    write_traces(file, about, [answer | {"logits": [[0.0, 1.0]] * 50, "accepted": [1] * 50}])
    with pytest.raises(DataError, match="50 positions, and at least 100"):
        read_traces(file)
    write_traces(file, about, [])
    with pytest.raises(DataError, match="0 positions"):
        read_traces(file)
    for broken in (
        answer | {"accepted": [3] * 120},
        answer | {"accepted": [1] * 119},
        answer | {"logits": [[0.0, float("nan")]] * 120},
        answer | {"logits": [[0.0]] + [[0.0, 1.0]] * 119},
    ):
        file.write_text(json.dumps({"format": 1, "conditions": about, "answers": [broken]}))
        with pytest.raises(DataError, match="not a file of traces"):
            read_traces(file)
    for text in ("[]", "{}", "{"):
        file.write_text(text)
        with pytest.raises(DataError, match="not a file of traces"):
            read_traces(file)
    with pytest.raises(DataError, match="no such traces"):
        read_traces(tmp_path / "none.json")


# ── what a load gives ─────────────────────────────────────────────────────────────────────────────────


def test_one_user_gets_what_counting_by_hand_gives() -> None:
    """Two of three proposals are accepted in every round: six positions take two rounds."""
    serve = Simulator(costs(), traces([2] * 6)).serve
    found = serve(Fixed(3), Arrivals(users=1), 50)
    each = READ + 2 * (PLAIN + PROPOSE + 3 * TOKEN)
    assert found.tokens_per_s == pytest.approx(7 / each)
    assert found.per_user == pytest.approx(7 / each) and found.answer_s[0] == pytest.approx(each)
    assert (found.verified, found.kept, found.drafted) == (3.0, 3.0, 1.0)
    found = serve(NONE, Arrivals(users=1), 50)
    assert found.tokens_per_s == pytest.approx(7 / (READ + 6 * PLAIN))
    assert (found.verified, found.kept, found.drafted) == (0.0, 1.0, 0.0)


def test_the_last_round_of_an_answer_keeps_what_is_left_and_costs_a_whole_one() -> None:
    found = Simulator(costs(), traces([4] * 6)).serve(Fixed(4), Arrivals(users=1), 50)
    assert found.tokens_per_s == pytest.approx(7 / (READ + 2 * (PLAIN + PROPOSE + 4 * TOKEN)))


def test_a_draft_reads_each_prompt_once_and_only_if_it_proposes() -> None:
    simulator = Simulator(costs(observe=0.5), traces([0] * 6))
    with_draft = simulator.serve(Fixed(1), Arrivals(users=1), 50)
    assert with_draft.answer_s[0] == pytest.approx(READ + 6 * (PLAIN + PROPOSE + TOKEN) + 0.5)
    assert simulator.serve(NONE, Arrivals(users=1), 50).answer_s[0] == pytest.approx(READ + 6 * PLAIN)


def test_more_users_than_slots_wait_and_all_are_served() -> None:
    simulator = Simulator(costs(), traces([1] * 6), slots=2)
    assert simulator.serve(NONE, Arrivals(users=8), 60).rows == pytest.approx(2.0)
    seldom = simulator.serve(NONE, Arrivals(rate=0.01), 60)
    assert seldom.first_s[0] == pytest.approx(READ) and not seldom.too_much
    assert simulator.serve(NONE, Arrivals(rate=10.0), 60).too_much


def test_a_pass_over_uneven_rows_takes_a_share_of_the_way_to_the_longest() -> None:
    """Of two rows that begin together, one verifies four proposals and the other none."""
    recorded = replace(traces([0] * 6), confidences=np.full((60, 4), 0.1))
    recorded.confidences[::2] = 0.9
    for ragged, tokens in ((0.0, 4), (0.5, 6), (1.0, 8)):
        simulator = Simulator(replace(costs(), ragged=ragged), recorded)
        rows = [_Row(0, 0, 0, 6, 8, 0), _Row(1, 1, 1, 6, 8, 0)]
        took = simulator._round(Threshold(0.5), rows, _Counts())
        assert took == pytest.approx(PLAIN + PROPOSE + tokens * TOKEN)


def test_trimming_after_verifying_keeps_the_same_and_pays_for_everything() -> None:
    simulator = Simulator(costs(), traces([3] * 9))
    cut, trimmed = (
        simulator.serve(simulated(name, simulator.costs, 4), Arrivals(users=2), 50)
        for name in ("fixed:1", "trim:fixed:1")
    )
    assert trimmed.kept == cut.kept and (cut.verified, trimmed.verified) == (1.0, 4.0)
    assert trimmed.tokens_per_s < cut.tokens_per_s


def test_the_oracle_verifies_what_is_accepted_as_far_as_it_pays() -> None:
    for token, lengths in ((0.01, [3, 0, 2]), (10.0, None)):
        oracle = Oracle(costs(token=token).rounds())
        oracle.outcomes = np.array([3, 0, 2])
        load = Load(3, 8.0)
        assert oracle.proposes(load) == (lengths is not None)
        if lengths is not None:
            assert oracle.lengths(np.full((3, 4), 0.5), load).tolist() == lengths


def test_no_policy_beats_the_oracle_and_auto_is_no_worse_than_the_best_length() -> None:
    """Confidences say which positions are accepted."""
    random = np.random.default_rng(0)
    sure = random.random((600, 4)) < 0.6
    recorded = replace(
        traces([0] * 20, answers=30),
        accepted=sure.cumprod(1).sum(1),
        confidences=np.where(sure, 0.9, 0.1),
    )
    simulator = Simulator(costs(token=0.05), recorded)
    speeds = {}
    for name in ("none", *(f"fixed:{k}" for k in range(1, 5)), "early-stop", "auto", "oracle"):
        found = simulator.serve(simulated(name, simulator.costs, 4), Arrivals(users=4), 150)
        speeds[name] = found.tokens_per_s
    assert max(speeds, key=speeds.__getitem__) == "oracle"
    best = max(speed for name, speed in speeds.items() if name == "none" or name.startswith("fixed"))
    assert speeds["auto"] > best


@pytest.mark.parametrize("bursty", [False, True])
def test_requests_come_at_the_rate_that_is_asked_for(bursty: bool) -> None:
    times = np.array(list(islice(Arrivals(rate=5.0, bursty=bursty).times(1), 20_000)))
    assert (np.diff(times) > 0).all()
    assert len(times) / times[-1] == pytest.approx(5.0, rel=0.1)
    counts = np.bincount((times // 2).astype(int))
    assert (counts.var() / counts.mean() > 3) == bursty, "random arrivals vary as much as their mean"


# ── the command ───────────────────────────────────────────────────────────────────────────────────────


def command(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["simulate", *words])
    return result.exit_code, result.stdout, result.stderr


def test_command_prints_draws_and_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspec.this_machine.this_machine", lambda: "a machine")
    table, file, plot = tmp_path / "costs.json", tmp_path / "traces.json", tmp_path / "load.svg"
    write_costs(table, costs())
    answer = {"id": "1", "prompt": 8, "logits": [[1.0] * 4] * 120, "accepted": [2] * 120}
    write_traces(file, {"draft_hash": "d1", "target_hash": "t1", "context_length": 256}, [answer])
    words = ["--costs", str(table), "--traces", str(file), "--users", "1,2", "--requests", "20"]
    few = ["--policy", "none", "--policy", "auto", "--policy", "trim:threshold:0.5"]
    code, out, _ = command(*words, *few, "--json", "--plot", str(plot))
    found = json.loads(out)
    assert (
        code == 0 and set(found) == {"1", "2"} and set(found["1"]) == {"none", "auto", "trim:threshold:0.5"}
    )
    assert plot.read_text("utf-8").count("<path") > 3
    code, out, err = command(*words, "--rate", "0.01", "--bursty", "--policy", "none")
    assert code == 0 and "0.01 requests/s" in out and "are extrapolated" in err
    for more, said in (
        (["--policy", "faster"], "is not a policy"),
        (["--bursty"], "send no bursts"),
        (["--prompt-tokens", "200"], "the target reads 256"),
    ):
        code, _, err = command(*words, *more)
        assert code == 2 and said in err
    for identity, said in (
        (Identity("another"), "another machine"),
        (Identity("a machine", target_hash="t1"), "of a target alone"),
        (Identity("a machine", target_hash="t1", draft_hash="d2"), "traces are of another draft"),
    ):
        write_costs(table, replace(costs(), identity=identity))
        code, _, err = command(*words)
        assert code == 2 and said in err


def test_lines_are_drawn_with_names_as_they_are(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "x.svg", "A & B", "users", "tokens/s", ["1", "2"], {"<a>": [1.0, 2.0], "b": [3.0, 4.0]}
    )
    text = (tmp_path / "x.svg").read_text("utf-8")
    ElementTree.fromstring(text)
    assert "A &amp; B" in text and "&lt;a&gt;" in text and text.count('stroke="#0072b2"') == 2


def test_policies_that_compare_costs_are_refused_without_them() -> None:
    for command_, words in (("eval", ["--draft", "pocket-dspark"]), ("verify", ["pocket-dspark"])):
        result = CliRunner().invoke(app, [command_, *words, "--policy", "auto"])
        assert result.exit_code == 2 and "add --costs FILE" in result.stderr
    result = CliRunner().invoke(app, ["generate", "hello", "--policy", "faster"])
    assert result.exit_code == 2 and "is not a policy" in result.stderr
