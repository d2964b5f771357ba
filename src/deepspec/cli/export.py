"""`deepspec export`: write a draft for an inference server."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from deepspec.checkpoints.servers import NATIVE, SERVERS
from deepspec.cli.common import DraftName, Dtype, Json, load_target, print_json
from deepspec.log import note

Server = StrEnum("Server", {name: name for name in (*SERVERS, NATIVE)})  # type: ignore[misc]


def export(
    draft: DraftName,
    to: Annotated[Server, typer.Option(help="The server that will load the draft.")],
    out: Annotated[Path, typer.Option(help="A new folder, or the folder of an earlier export.")],
    target: Annotated[
        str | None,
        typer.Option(help="Check the draft against this target, and leave out equal copies."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Number format; auto: as stored.")] = Dtype.auto,
    as_json: Json = False,
) -> None:
    """Write a draft for vLLM, SGLang or llama.cpp.

    If the server cannot run the draft, the command explains why and says what to do instead.

    \b
    Example:
      deepspec export pocket-dspark --to llamacpp --out exported/pocket-dspark --target pocket
    """
    import torch

    from deepspec.checkpoints.draft import check_draft
    from deepspec.checkpoints.export import check_free, export_draft
    from deepspec.checkpoints.read import find_checkpoint
    from deepspec.targets import TargetSpec

    # What can be refused is refused before the target's weights are loaded.
    find_checkpoint(draft)
    check_free(out)
    if target is not None:
        check_draft(draft, TargetSpec.from_pretrained(target))
    found = export_draft(
        draft,
        str(to),
        out,
        target=None if target is None else load_target(target),
        dtype=None if dtype is Dtype.auto else getattr(torch, dtype.value),
    )
    if as_json:
        print_json({**found._asdict(), "path": str(found.path)})
        return
    typer.echo(f"{found.path}: {found.architecture}, {found.dtype}, {found.parameters:,} parameters")
    for line in found.notes:
        note(line)
    for line in found.launch:
        typer.echo(line)
