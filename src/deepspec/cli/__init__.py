"""The command line: parse, call, print, exit code.

Exit codes: 0 done, 1 a failure of ours (with its traceback), 2 bad input, 130 interrupted. Tables and JSON go
to standard output, everything else to standard error. Each command imports what it needs when it runs, so
that `deepspec --help` loads neither torch nor transformers.
"""

from __future__ import annotations

import errno
import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from deepspec import __version__
from deepspec.cli import data, features, measure, plan, pocket, serving, sources
from deepspec.cli.common import SETTINGS, Json, print_json, print_results
from deepspec.errors import UserError
from deepspec.log import note, show_error

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
KEPT = {
    "quickstart": "answers, checkpoints and metrics so far are kept; the same command goes on from there",
    "train": "answers, checkpoints and metrics so far are kept; the same command goes on from there",
    "eval": "with --out, the prompts measured so far are kept; the same command goes on from there",
    "data": "the shards and answers finished so far are kept; the same command goes on with the rest",
    "pocket": "what was built so far is kept; the same command goes on from its last checkpoint",
}
_ELSEWHERE = "name a place that you may write to"
UNWRITABLE = {
    errno.EACCES: _ELSEWHERE,
    errno.EROFS: _ELSEWHERE,
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: "a folder on that path is a file: name another place",
    errno.ENOSPC: "make room on that disk; what was finished before is kept",
}
"""What the system may answer to a path that somebody named: no bug of ours."""


class Commands(TyperGroup):
    """The root group: what went wrong inside a command becomes a message and an exit code here."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            show_error(error)
            raise typer.Exit(BAD_INPUT) from None
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            where = error.filename or "a file being written"
            show_error(UserError(f"{where}: {error.strerror}", next_step=UNWRITABLE[error.errno]))
            raise typer.Exit(FAILED if error.errno == errno.ENOSPC else BAD_INPUT) from None
        except KeyboardInterrupt:
            kept = KEPT.get(ctx.invoked_subcommand or "", "nothing was left half-written")
            note(f"interrupted: {kept}", style="yellow")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands, help="Make a language model faster without changing what it says.", **SETTINGS
)


def main() -> None:
    """The console script."""
    app(prog_name="deepspec")


@app.callback(invoke_without_command=True)
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        typer.echo(f"deepspec {__version__}")
    elif ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


@app.command()
def quickstart(
    fast: Annotated[bool, typer.Option("--fast", help="All of it on little data, in two minutes.")] = False,
    out: Annotated[Path, typer.Option("--out", help="Folder for runs, results and the report.")] = Path(
        "runs/quickstart"
    ),
    as_json: Json = False,
) -> None:
    """Train three drafts for the pocket target, measure them, write a report.

    \b
    Example:
      deepspec quickstart --fast
    """
    from deepspec.workflow import quickstart as run

    report, results = run(out, fast=fast)
    if as_json:
        print_json({"report": str(report), "results": results})
        return
    print_results(results)
    typer.echo(f"report: {report}")


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or the path of a .yaml file.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Such as optim.lr=1e-3.")
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", help="Where the run's folder goes.")] = Path("runs"),
    answers: Annotated[
        Path | None,
        typer.Option("--answers", exists=True, dir_okay=False, help="Instead of the recipe's data.train."),
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option("--from", metavar="DRAFT", help="Fine-tune this draft instead of a fresh one."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew; an earlier run of that name is moved aside.")
    ] = False,
) -> None:
    """Train a draft, or go on where the run of that name stopped.

    \b
    Example:
      deepspec train pocket-dspark optim.max_minutes=2
      deepspec train pocket-dspark --from pocket-dspark thinking=true name=thinker
    """
    from deepspec.config import load_recipe

    if start_from is not None:
        overrides = [*(overrides or []), f"start_from={json.dumps(start_from)}"]
    settings = load_recipe(recipe, overrides or [])
    from deepspec.files import alone_in
    from deepspec.workflow import train_draft

    run = runs / settings.name
    if fresh and run.exists():
        aside = next(p for n in range(1, 10**6) if not (p := run.with_name(f"{run.name}.old-{n}")).exists())
        with alone_in(run, "training"):
            run.rename(aside)
        note(f"the earlier run is kept as {aside}")
    if not (run / "checkpoints").is_dir():
        note(f"starting a new run in {run}")
    outcome = train_draft(settings, runs, answers=answers)
    typer.echo(f"best checkpoint: {outcome.best}")
    if outcome.held_out_tau is not None:
        typer.echo(f"held-out τ: {outcome.held_out_tau:.3f} tokens per verify round")
    typer.echo(f"trained: {outcome.steps} steps, {outcome.tokens:,} tokens, {outcome.seconds:.0f} s")
    if outcome.interrupted:
        words = ["deepspec", "train", recipe, *(overrides or []), "--runs", str(runs)]
        words += ["--answers", str(answers)] if answers else []
        note(f"interrupted after step {outcome.steps}, saved; to go on:", style="yellow")
        note(f"  {shlex.join(words)}")
        raise typer.Exit(INTERRUPTED)
    words = ["deepspec", "eval", "--target", settings.target, "--draft", str(run)]
    words += [] if settings.target == "pocket" else ["--prompts", "PROMPTS.jsonl"]
    words += ["--thinking"] if settings.thinking else []
    typer.echo(f"next: {shlex.join(words)}")


app.command()(plan.plan)
app.command("eval")(measure.evaluate)
app.command()(measure.compare)
app.command()(measure.report)
app.command()(measure.generate)
app.command()(measure.inspect)
app.command()(serving.export)
data.data_app.command("download")(sources.download)
data.data_app.command("split")(sources.split)
data.data_app.command("cache")(features.cache)
data.data_app.command("features-server")(features.features_server)
app.add_typer(data.data_app, name="data")
app.add_typer(pocket.pocket_app, name="pocket")
