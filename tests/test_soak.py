"""Killed again and again at seeded random moments: nothing is lost, nothing is done twice (`make soak`).

Children are forked from a process that has everything imported, so a kill costs a fraction of a second and
falls inside the work instead of into the imports.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deepspec.answers.dialogue import turns_of
from deepspec.answers.file import beside, last_mark
from deepspec.answers.in_process import regenerate
from deepspec.answers.through_servers import regenerate_served
from deepspec.cli import app
from deepspec.data.conversations import Conversation, conversation_from_row
from deepspec.errors import UserError
from deepspec.http_client import Policy
from deepspec.targets import Target
from kills import at_operation, disk_of, in_child, killed_at
from standin import PASSING, StandIn
from talking import recipe_tree, save_talking_llama, write_data, write_recipe
from test_train import metrics_of, same_state

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes"),
]
KILLS = 50


def run_command(*words: object) -> None:
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == 0, result.output


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


# ── regenerate ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    path = save_talking_llama(tmp_path_factory.mktemp("talking"))
    return Target.from_pretrained(path, dtype="float32", device="cpu")


def prompts(count: int) -> list[Conversation]:
    """Every seventh asks twice."""
    turns = [[f"What is {i} and {i}?", *(["Why?"] if i % 7 == 0 else [])] for i in range(count)]
    return [conversation_from_row({"id": f"r{i}", "turns": t}) for i, t in enumerate(turns)]


def where_killed(out: Path) -> str:
    if not out.exists() or not out.stat().st_size:
        return "before the first line"
    if not out.read_bytes().endswith(b"\n"):
        return "mid-line"
    mark = last_mark(beside(out, "timings"))
    return "between stretches" if mark == out.stat().st_size else "between lines of a stretch"


def test_answers_killed_at_fifty_moments_come_out_the_same_to_the_byte(
    target: Target, tmp_path: Path
) -> None:
    rows, cut = prompts(600), tmp_path / "cut.jsonl"

    def work(out: Path) -> None:
        regenerate(target, rows, out, max_new_tokens=8, max_rows=2)

    began = time.perf_counter()
    work(tmp_path / "whole.jsonl")
    stretch = (time.perf_counter() - began) / (len(rows) / 16)
    moments, seen = random.Random(7), Counter[str]()
    while sum(seen.values()) < KILLS:
        if sum(seen.values()) % 2:
            # A stretch has sixteen lines, and three operations that close it.
            assert killed_at(moments.randint(1, 30), lambda: work(cut))
        else:
            child = in_child(lambda: work(cut))
            time.sleep(moments.uniform(0, 1.5 * stretch))
            os.kill(child, signal.SIGKILL)
            assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "it was done before the kill: give it more rows"
        seen[where_killed(cut)] += 1
    work(cut)
    print(f"killed: {dict(seen)}")
    places = {"before the first line", "mid-line", "between lines of a stretch", "between stretches"}
    assert set(seen) == places
    assert seen["mid-line"] >= 10
    assert cut.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_answers_survive_a_disk_that_is_full_again_and_again(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, cut = prompts(100), tmp_path / "cut.jsonl"

    def work(out: Path) -> None:
        regenerate(target, rows, out, max_new_tokens=8, max_rows=2)

    work(tmp_path / "whole.jsonl")
    sizes, full, torn = random.Random(3), 0, 0
    while True:
        try:
            with disk_of(sizes.randint(1, 12_000), monkeypatch):
                work(cut)
            break
        except UserError as error:
            assert "No space left on device" in str(error)
            full += 1
            torn += cut.exists() and not cut.read_bytes().endswith(b"\n")
    print(f"full {full} times, {torn} of them in the middle of a line")
    assert torn >= 5
    assert cut.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# ── regenerate through servers ────────────────────────────────────────────────────────────────────────


def misbehaving(port: int, seed: int) -> int:
    """The process id of a stand-in server of its own: three answers of ten are some fault or other."""

    def serve() -> None:
        dice, lock = random.Random(seed), threading.Lock()

        def fault(n: int) -> str | None:
            with lock:
                return dice.choice(PASSING) if dice.random() < 0.3 else None

        StandIn(fault, port=port, answer=lambda said: (time.sleep(0.02), (f"echo {said}", None))[1])
        time.sleep(600)

    return in_child(serve)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def stop(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_every_prompt_once_while_servers_and_the_run_itself_are_killed(tmp_path: Path) -> None:
    """Two servers that die and come back at random, and a client that is killed at KILLS moments."""
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    rows, out, dice = prompts(1800), tmp_path / "a.jsonl", random.Random(5)
    policy = Policy(0.5, 30, 0.01, 0.1, 60)

    def work() -> None:
        regenerate_served(
            [f"http://127.0.0.1:{port}" for port in ports], rows, out, concurrency=8, policy=policy
        )

    def work_until(operation: int) -> None:
        def act(n: int, half: Callable[[], object]) -> None:
            if n == operation:
                half()
                os.kill(os.getpid(), signal.SIGKILL)

        with at_operation(act):
            work()

    alive = {port: misbehaving(port, port) for port in ports}
    deaths, seen = 0, Counter[str]()
    while sum(seen.values()) < KILLS:
        # Every other time it dies at a durable operation of its own, else when the file has grown by so much.
        own = sum(seen.values()) % 2 == 1
        client = in_child(partial(work_until, dice.randint(1, 40) if own else sys.maxsize))
        enough, latest = size(out) + dice.randint(0, 6000), time.monotonic() + 20
        dead = False
        while not dead and (own or size(out) < enough) and time.monotonic() < latest:
            time.sleep(0.02)
            dead = os.waitid(os.P_PID, client, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            if dice.random() < 0.05:
                if len(alive) == 2:
                    stop(alive.pop(dice.choice(ports)))
                    deaths += 1
                else:
                    alive |= {p: misbehaving(p, dice.randint(0, 10**6)) for p in ports if p not in alive}
        os.kill(client, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(client, 0)[1]), "it was done before the kill: give it more rows"
        seen[where_killed(out)] += 1
    work()
    for process in alive.values():
        stop(process)
    print(f"killed: {dict(seen)}; {deaths} deaths of servers")
    assert deaths >= 10
    assert seen["mid-line"] >= 5
    found = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert sorted(row["id"] for row in found) == sorted(row.id for row in rows)
    assert not beside(out, "failures").exists()
    asked = {row.id: [turn[0]["content"] for turn in turns_of(row)] for row in rows}
    for row in found:
        texts = [message["content"] for message in row["messages"]]
        assert texts == [t for q in asked[row["id"]] for t in (q, f"echo {q}")]
