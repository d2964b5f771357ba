"""Killed again and again at seeded random moments: nothing is lost, nothing is done twice (`make soak`).

Children are forked from a process that has everything imported, so a kill costs a fraction of a second and
falls inside the work instead of into the imports.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deepspec.cli import app
from talking import recipe_tree, save_talking_llama, write_data, write_recipe, write_rows
from test_train import metrics_of, same_state

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes"),
]
KILLS = 50


def run_command(*words: object) -> None:
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == 0, result.output


def in_child(work: Callable[[], None]) -> int:
    """The process id of a fork that does the work and exits 0."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def killed_often(work: Callable[[], None], seconds: float, where: Callable[[], str]) -> Counter[str]:
    """Start the work again and again, kill it KILLS times within `seconds`, then let it end.

    What `where` says after each kill is counted: which moments were hit.
    """
    moments, seen = random.Random(7), Counter[str]()
    while sum(seen.values()) < KILLS:
        child = in_child(work)
        time.sleep(moments.uniform(0, seconds))
        if os.waitpid(child, os.WNOHANG)[0] == child:
            break  # it was done before the kill
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen[where()] += 1
    _, status = os.waitpid(in_child(work), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return seen


def test_training_killed_at_random_moments_equals_the_undisturbed_run(tmp_path: Path) -> None:
    target = save_talking_llama(tmp_path / "target")
    write_data(tmp_path)
    tree = recipe_tree(target, tmp_path, "dspark", max_steps=150)
    tree |= {"eval_every_steps": 50, "checkpoint_every_steps": 3}
    recipe = write_recipe(tmp_path / "r.yaml", tree)
    began = time.perf_counter()
    run_command("train", recipe, "--runs", tmp_path / "whole")
    seconds = time.perf_counter() - began
    run = tmp_path / "cut/tiny-dspark"

    def where() -> str:
        checkpoints = run / "checkpoints"
        torn = list(checkpoints.glob(".*")) if checkpoints.is_dir() else []
        return "while saving" if torn else "between saves"

    seen = killed_often(lambda: run_command("train", recipe, "--runs", tmp_path / "cut"), seconds / 12, where)
    assert seen["between saves"] and seen["while saving"], seen
    same_state(run / "checkpoints/step_150", tmp_path / "whole/tiny-dspark/checkpoints/step_150")
    assert metrics_of(run) == metrics_of(tmp_path / "whole/tiny-dspark")
    print(f"killed: {dict(seen)}")


def test_answers_killed_at_random_moments_are_each_there_once(tmp_path: Path) -> None:
    target = save_talking_llama(tmp_path / "target")
    prompts = write_rows(tmp_path / "prompts.jsonl", [(f"What is {i} and {i}?", None) for i in range(400)])

    def regenerate(out: Path) -> None:
        words = ["data", "regenerate", prompts, "--target", target, "--out", out, "--max-new-tokens", 24]
        run_command(*words)

    began = time.perf_counter()
    regenerate(tmp_path / "whole.jsonl")
    seconds = time.perf_counter() - began
    cut = tmp_path / "cut.jsonl"

    def where() -> str:
        if not cut.exists() or not cut.stat().st_size:
            return "before the first line"
        return "between lines" if cut.read_bytes().endswith(b"\n") else "mid-line"

    seen = killed_often(lambda: regenerate(cut), seconds / 12, where)
    assert seen["between lines"], seen
    whole, found = (
        [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for path in (tmp_path / "whole.jsonl", cut)
    )
    assert sorted(r["id"] for r in found) == sorted(r["id"] for r in whole)
    assert {r["id"]: r for r in found} == {r["id"]: r for r in whole}
    print(f"killed: {dict(seen)}")
