"""A torn or partly copied run resumes from its newest whole checkpoint, says so, and loses no evidence."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepspec.checkpoints.draft import load_draft
from deepspec.drafts.base import NeuralDraft
from deepspec.errors import CheckpointError
from deepspec.targets import Target
from deepspec.train.build import build_draft
from deepspec.train.optimizer import Optimizer
from deepspec.train.run import Progress, Run, open_run
from kills import contents
from talking import train_in
from test_train import metrics_of, recipe_for, rows_for, same_state

RECIPE = recipe_for("dspark", precision="bfloat16")


@pytest.fixture(scope="module")
def whole(targets: dict[str, Target], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps, with checkpoints at 3 and 6."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train_in(folder, RECIPE, targets["llama"], rows_for(targets["llama"]), lambda draft: 1.5)
    return folder


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture(scope="module")
def trained(targets: dict[str, Target]) -> tuple[NeuralDraft, Optimizer]:
    draft = build_draft(RECIPE, targets["llama"])
    return draft, Optimizer(draft, RECIPE.optim)


def resumed(folder: Path, trained: tuple[NeuralDraft, Optimizer]) -> Progress:
    return Run(folder, RECIPE).resume(*trained, {})


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "short": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "one byte short": lambda file: file.write_bytes(file.read_bytes()[:-3]),
    "garbage": lambda file: file.write_bytes(bytes(range(256)) * 20),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "a list": lambda file: file.write_bytes(b"[1, 2]\n"),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


WEIGHTY = ("optimizer.pt", "progress.json", "model.safetensors", "config.json", "deepspec.json")
OLDER = ("manifest.json", "missing")
"""A checkpoint from before there were manifests, which resumes."""
FILES = [(name, kind) for name in (*WEIGHTY, "manifest.json") for kind in DAMAGE if (name, kind) != OLDER]


@pytest.mark.parametrize(("name", "kind"), FILES)
def test_newest_whole_checkpoint_is_found_whatever_file_is_damaged(trained, copied, capsys, name, kind):
    newest = copied / "checkpoints" / "step_6"
    DAMAGE[kind](newest / name)
    before = contents(newest)
    assert resumed(copied, trained).step == 3
    said = " ".join(capsys.readouterr().err.split())
    assert f"{newest} is not whole (it is kept as step_6.damaged): " in said
    assert f"the run resumes from step 3 resuming {copied} from step 3" in said
    assert contents(newest.with_name("step_6.damaged")) == before and not newest.exists()


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_state(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(step: Path) -> None:
        state = torch.load(step / "optimizer.pt", weights_only=True)
        change(state)
        torch.save(state, step / "optimizer.pt")

    return edit


def from_step_3(name: str) -> Callable[[Path], object]:
    return lambda step: shutil.copy(step.with_name("step_3") / name, step / name)


def poison_weights(step: Path) -> None:
    file = step / "model.safetensors"
    weights = load_file(file)
    weights["fc.weight"][0, 0] = math.nan
    save_file(weights, file)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (from_step_3("optimizer.pt"), "optimizer.pt and model.safetensors differ in"),
        (from_step_3("model.safetensors"), "optimizer.pt and model.safetensors differ in"),
        (from_step_3("progress.json"), "progress.json tells of step 3"),
        (
            lambda step: edit_json(step / "progress.json", seconds=math.nan),
            "tells of step 6 and nan s",
        ),
        (lambda step: edit_json(step / "progress.json", tokens="many"), "ValidationError"),
        (lambda step: edit_json(step / "config.json", hidden_size=64), "config.json implies"),
        (lambda step: edit_json(step / "config.json", model_type="other", architectures=["X"]), ""),
        (poison_weights, "fc.weight holds numbers that are not finite"),
        (edit_state(lambda s: s["masters"][2].view(-1)[0].fill_(math.nan)), "differ in"),
        (
            edit_state(lambda s: s["adamw"]["state"][1]["exp_avg"].fill_(math.inf)),
            "moments of weight 1",
        ),
        (
            edit_state(lambda s: s["adamw"]["state"][0].update(exp_avg=torch.zeros(2))),
            "moments of weight 0",
        ),
        (edit_state(lambda s: s["adamw"]["state"][0].pop("exp_avg_sq")), "KeyError: 'exp_avg_sq'"),
        (edit_state(lambda s: s["masters"].pop()), "it trains a draft of another shape"),
        (edit_state(lambda s: s.pop("adamw")), "KeyError: 'adamw'"),
        (edit_state(lambda s: s["adamw"].pop("param_groups")), "KeyError: 'param_groups'"),
    ],
)
def test_files_that_do_not_belong_together_are_no_whole_checkpoint(trained, copied, capsys, damage, why):
    """Files of another step or draft, and checkpoints in which an older version kept NaN; those have no
    manifest either."""
    (copied / "checkpoints/step_6/manifest.json").unlink()
    damage(copied / "checkpoints" / "step_6")
    assert resumed(copied, trained).step == 3
    assert why in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["optimizer.pt", "deepspec.json"])
def test_one_changed_byte_is_noticed(trained, copied, capsys, name):
    """A moment that is a little off is as finite, and in as good a shape, as the right one."""
    newest = copied / "checkpoints/step_6"
    if name == "optimizer.pt":
        edit_state(lambda s: s["adamw"]["state"][1]["exp_avg"].view(-1)[0].add_(1e-3))(newest)
    else:
        edit_json(newest / name, tokens=7)
    assert resumed(copied, trained).step == 3
    assert f"{name} is not as it was written" in " ".join(capsys.readouterr().err.split())


def test_run_with_a_torn_checkpoint_ends_as_the_undisturbed_one(targets, whole, copied):
    target = targets["llama"]
    DAMAGE["short"](copied / "checkpoints/step_6/optimizer.pt")
    (copied / "checkpoints/step_9").mkdir()  # all that was copied of a later one
    outcome = train_in(copied, RECIPE, target, rows_for(target), lambda draft: 1.5)
    assert (outcome.steps, outcome.held_out_tau) == (6, 1.5)
    same_state(copied / "checkpoints/step_6", whole / "checkpoints/step_6")
    assert metrics_of(copied) == metrics_of(whole)
    found = sorted(p.name for p in (copied / "checkpoints").iterdir())
    assert found == ["best", "step_3", "step_6", "step_6.damaged", "step_9.damaged"]


def test_second_damaged_checkpoint_of_a_step_does_not_replace_the_first(trained, copied):
    for content in (b"first", b"second"):
        (copied / "checkpoints/step_6").mkdir(exist_ok=True)
        (copied / "checkpoints/step_6/optimizer.pt").write_bytes(content)
        assert resumed(copied, trained).step == 3
    names = ("step_6.damaged", "step_6.damaged1")
    kept = [(copied / "checkpoints" / name / "optimizer.pt").read_bytes() for name in names]
    assert kept == [b"first", b"second"]


def test_run_without_a_whole_checkpoint_says_so_and_stays_as_it_is(targets, copied):
    for step in ("step_3", "step_6"):
        DAMAGE["short"](copied / "checkpoints" / step / "optimizer.pt")
    before = contents(copied)
    with pytest.raises(
        CheckpointError, match="no checkpoint of this run is whole; of the newest, a file"
    ) as caught:
        train_in(copied, RECIPE, targets["llama"], rows_for(targets["llama"]), lambda draft: 9.0)
    assert str(caught.value.where).endswith("step_6")
    assert "copy the run's folder again" in str(caught.value) and "--fresh" in str(caught.value)
    assert contents(copied) == before


@pytest.mark.parametrize("kind", ["missing", "short"])
def test_torn_best_is_kept_aside_and_measured_again(targets, copied, capsys, kind):
    target = targets["llama"]
    DAMAGE[kind](copied / "checkpoints/best/model.safetensors")
    outcome = train_in(copied, RECIPE, target, rows_for(target), lambda draft: 1.25)
    assert outcome.held_out_tau == 1.25
    assert "best is not whole (it is kept as best.damaged)" in " ".join(capsys.readouterr().err.split())
    assert load_draft(copied, target).spec.algorithm == "dspark"


def test_best_that_was_not_copied_is_measured_again(targets, copied, capsys):
    target = targets["llama"]
    shutil.rmtree(copied / "checkpoints/best")
    assert train_in(copied, RECIPE, target, rows_for(target), lambda draft: 1.25).held_out_tau == 1.25
    assert "best is not whole: " in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("kind", ["empty", "garbage", "short"])
def test_torn_recipe_of_a_run_is_kept_aside(targets, whole, tmp_path, capsys, kind):
    folder = Path(shutil.copytree(whole, tmp_path / RECIPE.name))
    (folder / "recipe.yaml").write_text("algorithm: dspark\ndraft: {num_layers: [2\n  blo")
    if kind != "short":
        DAMAGE[kind](folder / "recipe.yaml")
    with open_run(tmp_path, RECIPE) as run:
        draft = build_draft(RECIPE, targets["llama"])
        assert run.resume(draft, Optimizer(draft, RECIPE.optim), {}).step == 6
    assert "recipe.yaml is not whole (it is kept as recipe.yaml.damaged)" in " ".join(
        capsys.readouterr().err.split()
    )
