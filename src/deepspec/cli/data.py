"""data: from prompts to what training starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepspec.cli import masks
from deepspec.cli.common import (
    SETTINGS,
    MaxNew,
    Seed,
    TargetName,
    Thinking,
    TopK,
    TopP,
    load_target,
    prompt_file,
    sampling_of,
)

data_app = typer.Typer(help="Prepare conversations to train on.", no_args_is_help=True, **SETTINGS)
data_app.command("inspect")(masks.inspect)


@data_app.callback()
def data_root() -> None:
    """Prepare conversations to train on."""


@data_app.command("regenerate")
def data_regenerate(
    prompts: Annotated[
        str, typer.Argument(metavar="PROMPTS", help="JSONL file of prompts, or pocket:train.")
    ],
    out: Annotated[Path, typer.Option("--out", help="JSONL file that answers are appended to.")],
    target: TargetName = "pocket",
    thinking: Thinking = False,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="1: the target's own law.")
    ] = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNew = 256,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Prompts decoded together.")] = 16,
    seed: Seed = 0,
) -> None:
    """Have the target answer prompts, so that a draft learns what this target writes.

    Rows that the output file already answers are not asked again.

    \b
    Example:
      deepspec data regenerate prompts.jsonl --out answers.jsonl --target pocket
    """
    source, sampling = prompt_file(prompts, target), sampling_of(temperature, top_k, top_p)
    from deepspec.data.conversations import read_conversations
    from deepspec.data.regenerate import regenerate

    asked = list(read_conversations(source))
    new = regenerate(
        load_target(target),
        asked,
        out,
        thinking=thinking,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        max_rows=rows,
        seed=seed,
    )
    there = len({c.id for c in asked}) - new
    typer.echo(f"{out}: {new} new answers" + (f", {there} were there already" if there else ""))
