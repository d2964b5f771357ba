"""`deepspec export`: write a draft for an inference server."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from deepspec.checkpoints.servers import GGUF, NATIVE, SERVERS
from deepspec.cli.common import DraftName, Json, load_target, print_json
from deepspec.errors import UserError
from deepspec.log import note

Server = StrEnum("Server", {name: name for name in (*SERVERS, GGUF, NATIVE)})  # type: ignore[misc]
Format = StrEnum("Format", ["auto", "float32", "bfloat16", "float16", "q8_0"])


def export(
    draft: DraftName,
    to: Annotated[Server, typer.Option(help="The server that will load the draft; gguf: llama.cpp's file.")],
    out: Annotated[Path, typer.Option(help="A new folder (gguf: file), or the one of an earlier export.")],
    target: Annotated[
        str | None,
        typer.Option(help="Check the draft against this target, and leave out equal copies; gguf needs it."),
    ] = None,
    dtype: Annotated[
        Format, typer.Option(help="Number format; auto: as stored; q8_0: gguf only.")
    ] = Format.auto,
    target_gguf: Annotated[
        Path | None,
        typer.Option(help="gguf: the target's GGUF file that will be served; its tokenizer is copied."),
    ] = None,
    pre: Annotated[
        str | None,
        typer.Option(help="gguf: llama.cpp's name for how the tokenizer splits text (tokenizer.ggml.pre)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a draft for vLLM, SGLang or llama.cpp.

    If the server cannot run the draft, the command explains why and says what to do instead. For llama.cpp,
    `--to gguf` writes the file that its server loads, and `--to llamacpp` the folder that its converter
    reads; if --out ends in .gguf, both write the file.

    \b
    Example:
      deepspec export pocket-dspark --to gguf --target pocket --out draft.gguf
    """
    import torch

    from deepspec.checkpoints.draft import check_draft
    from deepspec.checkpoints.export import check_free, export_draft
    from deepspec.checkpoints.gguf_draft import check_free_file, export_gguf
    from deepspec.checkpoints.read import find_checkpoint
    from deepspec.targets import TargetSpec

    to_file = to == GGUF or (to == "llamacpp" and out.suffix == ".gguf")
    if not to_file and (dtype is Format.q8_0 or target_gguf is not None or pre is not None):
        raise UserError("--dtype q8_0, --target-gguf and --pre are for GGUF files", next_step="add --to gguf")
    if target_gguf is not None and pre is not None:
        raise UserError("--target-gguf copies the name that --pre would set", next_step="give one of them")
    if to_file and target is None:
        raise UserError(
            "a GGUF file also holds the target's tokenizer, and no target was given",
            next_step="add --target T, the model that the draft was trained for",
        )
    # What can be refused is refused before the target's weights are loaded.
    find_checkpoint(draft)
    (check_free_file if to_file else check_free)(out)
    if target is not None:
        check_draft(draft, TargetSpec.from_pretrained(target))
    loaded = None if target is None else load_target(target)
    wanted = None if dtype is Format.auto else dtype.value
    if to_file and loaded is not None:
        found = export_gguf(draft, out, loaded, dtype=wanted, pre=pre, served=target_gguf)
    else:
        kind = None if wanted is None else getattr(torch, wanted)
        found = export_draft(draft, str(to), out, target=loaded, dtype=kind)
    if as_json:
        print_json({**found._asdict(), "path": str(found.path)})
        return
    typer.echo(f"{found.path}: {found.architecture}, {found.dtype}, {found.parameters:,} parameters")
    for line in found.notes:
        note(line)
    if found.to == "llamacpp":
        note("this folder is for llama.cpp's converter; --to gguf writes the file that its server loads")
    for line in found.launch:
        typer.echo(line)
