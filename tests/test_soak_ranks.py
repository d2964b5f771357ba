"""Two processes that train one draft, one of them killed at random moments: the weights of a whole run."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepspec.train.loop import train_draft
from test_ranks import codes, in_ranks, recipe_of, scene, started

__all__ = ["scene"]

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes"),
]
KILLS = 30
MORE = ("optim.max_steps=60", "eval_every_steps=20", "checkpoint_every_steps=2")


def test_two_ranks_of_which_one_is_killed_at_random_moments_end_with_the_same_weights(
    scene: Path, tmp_path: Path
) -> None:
    """A run that is done before all kills is compared, and another one is begun."""

    def training(name: str) -> Callable[[int], object]:
        return lambda rank: train_draft(recipe_of(scene, "dspark", *MORE), tmp_path / name)

    def weights(name: str) -> dict[str, torch.Tensor]:
        return load_file(tmp_path / name / "tiny-dspark/checkpoints/step_60/model.safetensors")

    began = time.monotonic()
    in_ranks(2, training("whole"), tmp_path)
    seconds, moments, killed, run = time.monotonic() - began, random.Random(3), 0, 1
    while killed < KILLS:
        children = started(2, training(f"cut{run}"), tmp_path)
        time.sleep(moments.uniform(0, seconds / 4))
        victim = moments.randrange(2)
        os.kill(children[victim], signal.SIGKILL)
        found = codes(children)
        assert found[1 - victim] in (0, 1), (tmp_path / f"rank-{1 - victim}.log").read_text()[-2000:]
        killed += found[victim] == -signal.SIGKILL
        run += found == [0, 0]  # both were done before the kill
    in_ranks(2, training(f"cut{run}"), tmp_path)
    whole = weights("whole")
    for cut in (weights(f"cut{number}") for number in range(1, run + 1)):
        worst = max(float((whole[name] - cut[name]).abs().max()) for name in whole)
        assert whole.keys() == cut.keys() and worst <= 1e-6
        assert all(torch.isfinite(value).all() for value in cut.values())
    print(f"killed {killed} times in {run} runs")
