"""`deepspec target convert`: a GGUF file as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepspec.cli.common import Dtype


def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL.gguf", help="A GGUF file, or a directory with one.")],
    out: Annotated[Path, typer.Option(help="A new folder.")],
    dtype: Annotated[Dtype, typer.Option(help="Number format of the weights; auto: float32.")] = Dtype.auto,
) -> None:
    """Write a GGUF model as a Hugging Face directory.

    A GGUF file can be a --target as it is, and is unpacked at every start. The directory starts faster, and
    other programs can load it. float32 holds every number of the file, bfloat16 takes half the space.

    \b
    Example:
      deepspec target convert model.gguf --out models/mine
    """
    from deepspec.targets.convert import convert_target

    target = convert_target(model, out, dtype.value)
    size = sum(f.stat().st_size for f in out.iterdir()) / 1e6
    typer.echo(f"{out}: {target.spec.model_type}, {str(target.dtype).removeprefix('torch.')}, {size:,.0f} MB")
    typer.echo(f"use it as --target {out}")
