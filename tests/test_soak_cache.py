"""`data cache` killed at fifty seeded moments, and on a disk that is full again and again (`make soak`).

Half of the kills come at random times, half at the n-th durable operation, a write being cut in the middle:
the moments that matter last microseconds, and random times alone would miss them.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import deepspec.train.data as workflow
from kills import at_operation, contents, count_operations, ended, in_child, killed_at
from talking import recipe_tree, save_talking_llama, write_recipe, write_rows
from test_soak import run_command

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes"),
]
KILLS, FULL_DISKS = 50, 20
MOMENTS = ("mid-shard", "mid-rename", "before the sidecar", "mid-sidecar", "mid-index", "between")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """The command, for 300 rows in eight small shards."""
    plan = workflow.plan_cache

    def small(*given: Any, **named: Any) -> Any:
        return plan(*given, **named | {"shard_bytes": named["shard_bytes"] * 2 // 3})

    monkeypatch.setattr(workflow, "plan_cache", small)
    target = save_talking_llama(tmp_path / "target")
    answers = write_rows(
        tmp_path / "answers.jsonl", [(f"{i} and {i}?", f"{i} and {i} " * 3) for i in range(300)]
    )
    tree = recipe_tree(target, tmp_path, "dspark")
    recipes = [write_recipe(tmp_path / f"{a}.yaml", tree | {"name": a}) for a in ("a", "b")]

    def run(out: Path) -> None:
        run_command("data", "cache", *recipes, "--answers", answers, "--out", out, "--shard-mb", 1)

    return run


def moment(out: Path, whole: dict[str, bytes]) -> str:
    """Where a killed process stood, from what it left."""
    left = [p.name for p in out.glob(".*.part")] if out.is_dir() else []
    names = [name.removeprefix(".").removesuffix(".part") for name in left]
    if names and names[0] == "index.json":
        return "mid-index"
    if names and names[0].endswith(".json"):
        return "mid-sidecar"
    if names:
        return "mid-rename" if (out / left[0]).stat().st_size == len(whole[names[0]]) else "mid-shard"
    alone = [p for p in out.glob("*.safetensors") if not p.with_suffix(".json").exists()]
    return "before the sidecar" if alone else "between"


def killed_after(work: Callable[[], None], seconds: float) -> bool:
    """Fork, do the work, kill it some time later: whether it was still at it."""
    child = in_child(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return not ended(child)


def test_a_cache_killed_at_fifty_moments_is_the_undisturbed_one(
    cache: Callable[[Path], None], tmp_path: Path
) -> None:
    began = time.perf_counter()
    operations = count_operations(lambda: cache(tmp_path / "whole"))
    seconds = time.perf_counter() - began
    whole, out = contents(tmp_path / "whole"), tmp_path / "cut"
    assert operations == 4 * (len(whole) - 1), whole.keys()  # the lock is not written to
    draw, seen, finished = random.Random(7), Counter[str](), 0
    while sum(seen.values()) < KILLS or set(MOMENTS) - set(seen):
        assert sum(seen.values()) < 4 * KILLS, f"never hit: {set(MOMENTS) - set(seen)}"
        if draw.random() < 0.5:
            killed = killed_after(lambda: cache(out), draw.uniform(0, seconds))
        else:
            killed = killed_at(draw.randint(1, operations), lambda: cache(out))
        if killed:
            seen[moment(out, whole)] += 1
        else:  # it came to its end before the kill: compare, and begin another
            assert contents(out) == whole
            shutil.rmtree(out)
            finished += 1
    cache(out)
    assert contents(out) == whole
    print(f"killed: {dict(seen)}; finished {finished + 1} times, always the same {len(whole)} files")


def test_a_cache_on_a_disk_that_is_full_again_and_again_is_the_undisturbed_one(
    cache: Callable[[Path], None], tmp_path: Path
) -> None:
    operations = count_operations(lambda: cache(tmp_path / "whole"))
    whole, out = contents(tmp_path / "whole"), tmp_path / "cut"
    draw, times = random.Random(11), 0
    while times < FULL_DISKS:
        full_at = draw.randint(1, operations)

        def act(n: int, half: Callable[[], None], full_at: int = full_at) -> None:
            if n == full_at:
                half()
                raise OSError(errno.ENOSPC, "No space left on device")

        try:
            with at_operation(act):
                cache(out)
        except AssertionError as failed:
            assert "No space left on device" in str(failed)
            assert not list(out.glob(".*.part"))
            times += 1
        else:
            assert contents(out) == whole
            shutil.rmtree(out)
    cache(out)
    assert contents(out) == whole
