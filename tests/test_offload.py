"""The optimiser on the host: the same numbers, no further wait, and what to do if memory runs out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deepspec.train.loop as loop
from deepspec.config import load_recipe
from deepspec.cost.formulas import OFFLOADED_BYTES
from deepspec.errors import RecipeError, UserError
from deepspec.features.batches import online
from deepspec.train.build import build_draft
from deepspec.train.optimizer import Optimizer
from deepspec.train.run import open_run
from talking import recipe_tree, train_in, write_recipe
from test_gpu_trace import needs_compiler, report_of
from test_plan import plan_of
from test_train import interrupting, recipe_for, rows_for, same_state


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_masters_in_another_memory_train_the_same_weights(targets, monkeypatch, precision):
    """As on a GPU, whose float32 weights have masters of their own on the host."""
    target, recipe = targets["llama"], recipe_for("dspark", precision=precision)
    rows, weights = rows_for(target, 4), []
    for apart in (False, True):
        if apart:
            monkeypatch.setattr(
                "deepspec.train.optimizer.master_of",
                lambda parameter, offload: parameter.detach().float().clone().requires_grad_(),
            )
        torch.manual_seed(0)
        draft = build_draft(recipe, target)
        optimizer = Optimizer(draft, recipe.optim, offload=True)
        for step in range(3):
            loop.train_step(draft, online(target, draft.feature_layers), rows, recipe, step, False, optimizer)
            assert optimizer.step(0.5).taken
        assert all(
            (m is p) != (apart or p.dtype != torch.float32)
            for m, p in zip(optimizer.masters, optimizer.parameters, strict=True)
        )
        weights.append([p.detach().clone() for p in optimizer.parameters])
    assert all(map(torch.equal, *weights))


@needs_compiler
def test_device_keeps_neither_masters_nor_moments_and_a_step_waits_once():
    """The norm of the gradients is read in any case; the gradients' copies are complete by then."""
    found = report_of(["dspark"], "--tiny", "--length", "256", "--offload")["dspark"]
    assert (found["waits"], found["waits of the optimiser"]) == (0, 1), found["about"]["waits"]
    assert 0.85 * found["planned, GB"] < found["peak, GB"] <= found["planned, GB"]


def test_run_may_be_offloaded_and_brought_back_whenever_it_continues(targets, tmp_path, monkeypatch):
    """Off, on, off: the masters' memory is in no checkpoint."""
    target, seen = targets["llama"], []
    rows = rows_for(target)

    def apart(parameter: torch.Tensor, offload: bool) -> torch.Tensor:
        seen.append(offload)
        return parameter.detach().clone().requires_grad_() if offload else parameter

    monkeypatch.setattr("deepspec.train.optimizer.master_of", apart)
    path = write_recipe(tmp_path / "r.yaml", recipe_tree(Path("unused"), tmp_path, "dflash", max_steps=6))
    every = ["eval_every_steps=2", "checkpoint_every_steps=2"]
    with open_run(tmp_path / "whole", load_recipe(path, every)) as run:
        whole = train_in(run.folder, run.recipe, target, rows, lambda draft: 1.5)
    for turn, word in enumerate(("false", "true", "false")):
        with open_run(tmp_path / "cut", load_recipe(path, [*every, f"offload_optimizer={word}"])) as run:
            cut = train_in(run.folder, run.recipe, target, rows, interrupting(1))
        assert cut.steps == 2 * (turn + 1) and seen[-1] == (word == "true")
    same_state(*(each.run / "checkpoints" / "step_6" for each in (whole, cut)))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["optim.states=8bit"],
            "`offload_optimizer` needs `optim.matrices=adamw` and `optim.states=float32`",
        ),
        (["optim.matrices=muon"], "`offload_optimizer` needs `optim.matrices=adamw`"),
        (["shard_draft=true"], "set one of `offload_optimizer` and `shard_draft`"),
    ],
)
def test_what_cannot_be_offloaded_is_refused(words: list[str], said: str):
    with pytest.raises(RecipeError, match=said):
        load_recipe("dspark/qwen3-4b", ["offload_optimizer=true", *words])


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory. Tried to pin 2.00 GiB"),
    ],
)
@pytest.mark.parametrize(
    ("where", "figure"),
    [
        ("train.optimizer.adamw", "the optimiser"),
        ("train.optimizer.sent", "the optimiser"),
        ("train.step.features_of", "a micro-batch"),
    ],
)
def test_memory_that_runs_out_names_what_to_change(targets, tmp_path, monkeypatch, where, figure, error):
    def full(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(f"deepspec.{where}", full)
    recipe = recipe_for("dflash", precision="bfloat16")
    with pytest.raises(UserError, match=f"not enough memory for {figure}") as caught:
        train_in(tmp_path, recipe, targets["llama"], rows_for(targets["llama"]))
    assert "offload_optimizer=true" in str(caught.value) and "2.00 GiB" in str(caught.value)


def test_plan_of_an_offloaded_optimiser_counts_the_host():
    own = 615_221_249
    plans = [plan_of("dspark/qwen3-4b", "rtx4090", f"offload_optimizer={w}") for w in ("false", "true")]
    on_card = [p.sections["memory of the accelerator"]["draft, gradients, optimiser"].value for p in plans]
    assert on_card == [18 * own, 6 * own]
    on_host = [p.sections["memory of the host"]["at most at once"].value for p in plans]
    assert on_host[1] - on_host[0] == OFFLOADED_BYTES * own
    steps = plans[0].sections["data"]["optimiser steps"].value
    hours = [p.sections["time"]["training"].value for p in plans]
    assert (hours[1] - hours[0]) / steps == pytest.approx(own * (8 / 20e9 + 28 / 50e9))
    laptop = [
        plan_of("dspark/qwen3-4b", "laptop-cpu", f"offload_optimizer={w}").sections["memory of the host"]
        for w in ("false", "true")
    ]
    assert laptop[0]["at most at once"].value == laptop[1]["at most at once"].value
