"""`python -m tools.pocket`: build the pocket target, check it, and train its ready-made drafts."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from deepspec.cli import Commands
from deepspec.cli.common import SETTINGS, Json, print_json, stdout, table_of

pocket_app = typer.Typer(
    help="Build and check the pocket target.", no_args_is_help=True, cls=Commands, **SETTINGS
)


@pocket_app.command("build")
def pocket_build(
    out: Annotated[Path, typer.Option("--out", help="Folder of the build.")] = Path("build/pocket"),
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=10_000, help="Number of training tokens.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Number of CPU threads.")] = None,
) -> None:
    """Train the pocket target on this Python's standard library and on arithmetic.

    It takes about an hour on two cores. The same command continues after an interruption.

    \b
    Example:
      python -m tools.pocket build --out build/pocket
    """
    import torch

    from tools.pocket.build import BuildSettings, build

    if threads is not None:
        torch.set_num_threads(threads)
    settings = BuildSettings() if tokens is None else BuildSettings(total_tokens=tokens)
    build(out, settings)
    typer.echo(f"target: {out / 'target'}")
    typer.echo(f"next: python -m tools.pocket check --model {shlex.quote(str(out / 'target'))}")


@pocket_app.command("drafts")
def pocket_drafts(
    out: Annotated[Path, typer.Option("--out", help="Folder of the drafts.")] = Path("build/pocket-drafts"),
    minutes: Annotated[
        float, typer.Option("--minutes", min=0.01, help="Training time of each draft.")
    ] = 30.0,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Number of answers to each prompt.")] = 4,
    as_json: Json = False,
) -> None:
    """Train the three ready-made drafts of the pocket target.

    \b
    Example:
      python -m tools.pocket drafts --minutes 10
    """
    from tools.pocket.drafts import train_pocket_drafts

    outcomes = train_pocket_drafts(out, minutes=minutes, samples=samples)
    if as_json:
        print_json(
            {
                algorithm: {
                    "steps": outcome.steps,
                    "tokens": outcome.tokens,
                    "held_out_tau": outcome.held_out_tau,
                    "best": str(outcome.best),
                }
                for algorithm, outcome in outcomes.items()
            }
        )
        return
    table = table_of("draft", "steps", "tokens", "held-out τ", "best checkpoint")
    for algorithm, outcome in outcomes.items():
        tau = "–" if outcome.held_out_tau is None else f"{outcome.held_out_tau:.3f}"
        table.add_row(algorithm, str(outcome.steps), f"{outcome.tokens:,}", tau, str(outcome.best))
    stdout().print(table)


@pocket_app.command("check")
def pocket_check(
    model: Annotated[
        str, typer.Option("--model", help="pocket, or the target folder of a build.")
    ] = "pocket",
    problems: Annotated[int, typer.Option("--problems", min=1, help="Number of arithmetic problems.")] = 200,
    functions: Annotated[
        int, typer.Option("--functions", min=1, help="Number of functions to complete.")
    ] = 100,
    as_json: Json = False,
) -> None:
    """Measure the pocket target on held-out examples.

    The measures are correct arithmetic, code that parses, and loss; a few samples are shown as they are.

    \b
    Example:
      python -m tools.pocket check
    """
    from tools.pocket.check import check

    found = check(model, problems=problems, functions=functions)
    if as_json:
        print_json(found)
        return
    table = table_of("held-out measure", "share", "of")
    for name, part in found["shares"].items():
        table.add_row(name, f"{part['share']:.1%}", str(part["of"]))
    losses = table_of("loss, nats per answer token", "thinking off", "thinking on")
    for domain, part in found["loss"].items():
        losses.add_row(domain, f"{part['plain']:.3f}", f"{part['thinking']:.3f}")
    console = stdout()
    console.print(table, losses)
    for sample in found["samples"]:
        mode = ", thinking" if sample["thinking"] else ""
        console.print(Text(f"── {sample['domain']}{mode}", style="bold"))
        console.print(Text(f"{sample['question']}\n→ {sample['answer']}\n"), soft_wrap=True)


if __name__ == "__main__":
    pocket_app(prog_name="python -m tools.pocket")
