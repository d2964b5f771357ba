"""A real instruct model from end to end (benchmarks/real.py): its held-out prompts, its steps, its page."""

from __future__ import annotations

import json

import pytest

import real
import real_page
from servers import Answer


def test_no_held_out_prompt_is_trained_on_and_every_domain_is_there(tmp_path):
    """A prompt in both files would report what the draft has learnt by heart."""
    real.held_out(real.Work(tmp_path, real.FAST))
    held = [json.loads(line) for line in (tmp_path / "held.jsonl").read_text("utf-8").splitlines()]
    trained = {
        json.loads(line)["messages"][0]["content"]
        for line in real.prompts_path("pocket:train").read_text("utf-8").splitlines()
    }
    assert not trained & {row["messages"][0]["content"] for row in held}
    domains = {row["domain"] for row in held}
    assert domains >= {"pocket code", "pocket math", "pocket chat"}
    assert len(domains) == 3 + len(list(real.BENCHMARKS.glob("*.jsonl")))
    assert len({row["id"] for row in held}) == len(held) >= real.FAST.prompts


def test_a_finished_step_is_not_run_again_and_a_failed_one_is(tmp_path):
    work, calls = real.Work(tmp_path, real.FAST), []

    def step() -> int:
        calls.append(1)
        if len(calls) == 1:
            raise SystemExit(3)
        return 7

    with pytest.raises(SystemExit):
        work.once("step", step)
    assert [work.once("step", step), work.once("step", step)] == [7, 7]
    assert len(calls) == 2 and work.seconds("step") >= 0


@pytest.mark.parametrize(
    ("tau", "block", "plain", "round_", "expected"),
    [
        (3.0, 2.0, 10.0, 25.0, "this one"),  # a round of 2.5 plain steps gives 3 tokens
        (3.0, 2.0, 10.0, 50.0, "3.0× slower"),  # 2 + 3/f = 3
        (2.0, 2.0, 10.0, 21.0, "never"),  # the pass alone takes as long as it gives tokens
    ],
)
def test_size_from_which_a_draft_pays(tau, block, plain, round_, expected):
    row = {"round_ms": round_, "plain_ms": plain}
    assert real_page.pays(tau, block, row, {}, "dspark", True) == expected


def test_tau_by_domain_pools_the_rounds_of_each_engine():
    prompts = [real.Prompt(str(i), "ab"[i > 1], "", (1,)) for i in range(3)]
    ours = [Answer([], 6, 2, 1.0), Answer([], 2, 2, 1.0), Answer([], 3, 1, 1.0)]
    theirs = [Answer([], 4, 4, 1.0), Answer([], 5, 2, 1.0), Answer([], 0, 0, 1.0)]
    assert real.by_domain(prompts, ours, theirs) == {"a": [2.0, 1.5], "b": [3.0, 0.0]}


def test_page_in_docs_is_the_results_file_written_out():
    if not real_page.RESULTS.is_file():
        pytest.skip(f"{real_page.RESULTS.name} is missing: make real was not run here")
    results = json.loads(real_page.RESULTS.read_text("utf-8"))
    assert real_page.PAGE.read_text("utf-8") == real_page.page(results)
