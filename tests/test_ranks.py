"""Several processes that train one draft: the same figures as one process, one writer, and no hang."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import deepspec.train.loop as loop
from deepspec.config import Recipe, load_recipe
from deepspec.train.loop import train_draft
from kills import in_child, needs_fork
from talking import recipe_tree, save_talking_llama, write_data, write_recipe

pytestmark = needs_fork


def started(world: int, work: Callable[[int], object], folder: Path) -> list[int]:
    """Process ids of that many ranks of one job, each doing the work; their output goes to rank-N.log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def rank_work(rank: int) -> None:
        log = os.open(folder / f"rank-{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        loop.LOG_EVERY = 1
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ |= {key: str(value) for key, value in facts.items()} | {"MASTER_ADDR": "127.0.0.1"}
        try:
            work(rank)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()

    return [in_child(lambda rank=rank: rank_work(rank)) for rank in range(world)]


def codes(children: Sequence[int], seconds: float = 120.0) -> list[int]:
    """How the processes ended; a failure if they do not end in time."""
    found, end = [], time.monotonic() + seconds
    for child in children:
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > end:
                for other in children:
                    os.kill(other, signal.SIGKILL)
                pytest.fail("a rank did not end")
            time.sleep(0.02)
        found.append(os.waitstatus_to_exitcode(ended[1]))
    return found


def in_ranks(world: int, work: Callable[[int], object], folder: Path) -> None:
    children = started(world, work, folder)
    said = codes(children)
    assert said == [0] * world, [(folder / f"rank-{r}.log").read_text()[-2000:] for r in range(world)]


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a talking target, uneven data, and recipes of twenty steps."""
    folder = tmp_path_factory.mktemp("ranks")
    target = save_talking_llama(folder / "target")
    write_data(folder)
    lines = (folder / "answers.jsonl").read_text("utf-8").splitlines()
    long = json.loads(lines[0])
    long["id"], long["messages"][1]["content"] = "long", "red and " * 30
    (folder / "answers.jsonl").write_text("\n".join([*lines, json.dumps(long)]) + "\n")
    for algorithm in ("eagle3", "dspark"):
        tree = recipe_tree(target, folder, algorithm, max_steps=20, lr=1e-3)
        tree |= {"eval_every_steps": 10, "checkpoint_every_steps": 5}
        write_recipe(folder / f"{algorithm}.yaml", tree)
    return folder


def recipe_of(scene: Path, algorithm: str, *more: str) -> Recipe:
    return load_recipe(scene / f"{algorithm}.yaml", list(more))


@pytest.fixture(scope="module")
def alone(scene: Path) -> dict[str, Path]:
    """Both recipes by one process."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "LOG_EVERY", 1)
        for algorithm in ("eagle3", "dspark"):
            found[algorithm] = train_draft(recipe_of(scene, algorithm), scene / "alone").run
    return found


def test_two_and_four_ranks_have_the_losses_of_one(scene, alone, tmp_path):
    """Eleven rows in batches of four: a last batch has three, so that one of four ranks has none."""
    for world in (2, 4):

        def work(rank: int, runs: Path = tmp_path / str(world)) -> None:
            for algorithm in alone:
                train_draft(recipe_of(scene, algorithm), runs)

        in_ranks(world, work, tmp_path)
        for algorithm, run in alone.items():
            ours = losses(tmp_path / str(world) / f"tiny-{algorithm}")
            assert len(ours) == 20
            assert ours == pytest.approx(losses(run), abs=1e-5)
        for rank in range(1, world):
            assert (tmp_path / f"rank-{rank}.log").read_text() == ""
