"""`deepspec train`: train a draft."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from deepspec.cli.common import INTERRUPTED
from deepspec.log import note


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or the path of a .yaml file.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Such as optim.lr=1e-3.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder in which the run's own folder is made.")] = Path("runs"),
    answers: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Use this file, not the recipe's data.train."),
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option("--from", metavar="DRAFT", help="Fine-tune this draft instead of starting a fresh one."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over; an earlier run of that name is moved aside.")
    ] = False,
) -> None:
    """Train a draft, or continue the run of that name where it stopped.

    \b
    Example:
      deepspec train pocket-dspark optim.max_minutes=2
      deepspec train pocket-dspark --from pocket-dspark thinking=true name=thinker
    """
    from deepspec.config import load_recipe

    if start_from is not None:
        overrides = [*(overrides or []), f"start_from={json.dumps(start_from)}"]
    settings = load_recipe(recipe, overrides or [])
    from deepspec.train.loop import train_draft

    outcome = train_draft(settings, runs, answers=answers, fresh=fresh)
    typer.echo(f"best checkpoint: {outcome.best}")
    if outcome.held_out_tau is not None:
        typer.echo(f"held-out τ: {outcome.held_out_tau:.3f} tokens per verify round")
    typer.echo(f"trained: {outcome.steps} steps, {outcome.tokens:,} tokens, {outcome.seconds:.0f} s")
    if outcome.interrupted:
        words = ["deepspec", "train", recipe, *(overrides or []), "--runs", str(runs)]
        words += ["--answers", str(answers)] if answers else []
        note(f"interrupted and saved after step {outcome.steps}; to continue:", style="yellow")
        note(f"  {shlex.join(words)}")
        raise typer.Exit(INTERRUPTED)
    words = ["deepspec", "eval", "--target", settings.target, "--draft", str(outcome.run)]
    words += [] if settings.target == "pocket" else ["--prompts", "PROMPTS.jsonl"]
    words += ["--thinking"] if settings.thinking else []
    typer.echo(f"next: {shlex.join(words)}")
