"""A run: from a recipe and its data to the best checkpoint in runs/NAME."""

from __future__ import annotations

from pathlib import Path

from deepspec.config import Recipe, dump_recipe, feature_source, load_recipe
from deepspec.data.conversations import read_conversations
from deepspec.drafts.base import NeuralDraft
from deepspec.errors import RecipeError
from deepspec.files import alone_in
from deepspec.log import note, warn
from deepspec.measure.evaluate import held_out_tau, load_prompts
from deepspec.pocket import prompts_path
from deepspec.report.compare import mode_differences
from deepspec.targets import Target, TargetSpec
from deepspec.train.data import training_data
from deepspec.train.facts import provenance
from deepspec.train.loop import Outcome, eight_bit_adamw, latest_checkpoint, train


def train_draft(
    recipe: Recipe, runs: Path | str = "runs", *, target: Target | None = None, answers: Path | None = None
) -> Outcome:
    """Train a recipe into runs/<name>, or go on where it stopped.

    `answers` stands in for the recipe's training file. Held-out τ on the recipe's select prompts picks the
    best checkpoint. Raises UserError for bad data, recipes or targets, and where another
    process trains there.
    """
    _check_before_loading(recipe, answers)
    if target is None:
        TargetSpec.from_pretrained(recipe.target)  # a mistyped name should not leave a folder behind
    run = Path(runs) / recipe.name
    with alone_in(run, "training"):
        return _train_in(run, recipe, target or Target.from_pretrained(recipe.target), answers)


def _train_in(run: Path, recipe: Recipe, target: Target, answers: Path | None) -> Outcome:
    _keep_recipe(recipe, run)
    data = training_data(recipe, target, run, answers)
    prompts = load_prompts(
        prompts_path(recipe.data.select), target, thinking=recipe.thinking, limit=recipe.eval_prompts
    )

    def held_out(draft: NeuralDraft) -> float:
        return held_out_tau(target, draft, prompts, recipe.eval_max_new_tokens)

    facts = provenance(recipe, target, data.about)
    for sentence in mode_differences(f"{data.name} was answered", facts["data"], "the recipe trains", facts):
        warn(sentence)
    return train(recipe, target, data.rows, run, facts, held_out, data.source)


def _check_before_loading(recipe: Recipe, answers: Path | None) -> None:
    """Raise UserError for what would stop a run once its target is loaded and its data tokenised."""
    if recipe.optim.states == "8bit":
        eight_bit_adamw()
    form, _ = feature_source(recipe.data.features)
    next(read_conversations(prompts_path(recipe.data.select)), None)
    if form != "cache":
        asked_now = answers is None and recipe.data.train.startswith("pocket:")
        file = answers or prompts_path(recipe.data.train)
        next(read_conversations(file, require_answer=not asked_now), None)


def _keep_recipe(recipe: Recipe, run: Path) -> None:
    """Write the resolved recipe; say so when the run was started with another one.

    Raises RecipeError, and leaves the run's own recipe as it is, where that run began from another draft or
    trains a draft of another kind: going on would train neither.
    """
    path = run / "recipe.yaml"
    going_on = path.exists() and latest_checkpoint(run) is not None
    before = load_recipe(path) if going_on else recipe
    other = _other_draft(before, recipe)
    if other:
        raise RecipeError(
            f"{run} is a run that trains another draft: {'; '.join(other)}",
            next_step="give this one a name of its own (name=NAME), or start anew with --fresh",
        )
    if before.start_from != recipe.start_from:
        raise RecipeError(
            f"{run} is a run that began from {before.start_from or 'fresh weights'}, "
            f"not from {recipe.start_from or 'fresh weights'}",
            next_step="give this one a name of its own (name=NAME), or start anew with --fresh",
        )
    if before != recipe:
        note(f"{run} was started with another recipe; it goes on with this one")
    dump_recipe(recipe, path)


def _other_draft(before: Recipe, now: Recipe) -> list[str]:
    """What makes the drafts of two recipes different ones, weights of equal shapes included."""
    have, want = (
        {"algorithm": r.algorithm} | {f"draft.{k}": v for k, v in r.draft.model_dump().items()}
        for r in (before, now)
    )
    keys = (k for k in have if k != "draft.step_loss_decay" and have[k] != want[k])
    return [f"its {key} is {have[key]}, the recipe's {want[key]}" for key in keys]
