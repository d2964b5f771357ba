"""`deepspec train`: train a draft."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path
from typing import Annotated

import typer

from deepspec.cli.common import INTERRUPTED, Answers, Overrides, RecipeName
from deepspec.log import note, warn


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    runs: Annotated[Path, typer.Option(help="Folder in which the run's own folder is made.")] = Path("runs"),
    answers: Answers = None,
    start_from: Annotated[
        str | None,
        typer.Option("--from", metavar="DRAFT", help="Fine-tune this draft instead of starting a fresh one."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over; an earlier run of that name is moved aside.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Continue a run although the recipe or the data changed.")
    ] = False,
) -> None:
    """Train a draft, or continue a run where it stopped.

    A run is called as its recipe, or as name=NAME says. If data.train is pocket:train, as in the pocket
    recipes, the target answers these prompts first, which takes minutes. SIGTERM saves and exits with 0;
    under torchrun all processes train one draft together.

    \b
    Example:
      deepspec train pocket-dspark optim.max_minutes=2
      torchrun --nproc-per-node 8 --no-python deepspec train dspark/qwen3-4b
      deepspec train pocket-dspark --from pocket-dspark thinking=true name=thinker
    """
    from deepspec.config import load_recipe

    if start_from is not None:
        overrides = [*(overrides or []), f"start_from={json.dumps(start_from)}"]
    settings = load_recipe(recipe, overrides or [])
    from deepspec.planning import without_gpu
    from deepspec.train.loop import train_draft

    if (hint := without_gpu(settings)) is not None:
        warn(hint)
    outcome = train_draft(settings, runs, answers=answers, fresh=fresh, force=force)
    if outcome.rank:
        return  # the first one prints
    typer.echo(f"best checkpoint: {outcome.best}")
    if outcome.held_out_tau is not None:
        tau = f"held-out τ: {outcome.held_out_tau:.3f} tokens per verify round"
        typer.echo(f"{tau}, after step {outcome.best_step}")
        if outcome.last_tau is not None and outcome.best_step < outcome.steps:
            fall = outcome.last_tau - outcome.held_out_tau
            typer.echo(f"training ended on step {outcome.steps} with {outcome.last_tau:.3f} ({fall:+.3f})")
    if outcome.skipped:
        typer.echo(f"skipped: {outcome.skipped} steps, listed above")
    typer.echo(f"trained: {outcome.steps} steps, {outcome.tokens:,} tokens, {outcome.seconds:.0f} s")
    if outcome.interrupted:
        words = ["deepspec", "train", recipe, *(overrides or []), "--runs", str(runs)]
        words += ["--answers", str(answers)] if answers else []
        note(f"interrupted and saved after step {outcome.steps}; to continue:", style="yellow")
        note(f"  {shlex.join(words)}")
        raise typer.Exit(0 if outcome.interrupted == signal.SIGTERM else INTERRUPTED)
    words = ["deepspec", "eval", "--target", settings.target, "--draft", str(outcome.run)]
    words += [] if settings.target == "pocket" else ["--prompts", "PROMPTS.jsonl"]
    words += ["--thinking"] if settings.thinking else []
    typer.echo(f"next: {shlex.join(words)}")
