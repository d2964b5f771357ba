"""`deepspec inspect`: what a draft checkpoint is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from deepspec.cli.common import DraftName, Json, print_json, stdout
from deepspec.log import warn


def inspect(
    draft: DraftName,
    target: Annotated[str | None, typer.Option(help="Also check whether the draft fits this target.")] = None,
    as_json: Json = False,
) -> None:
    """Describe a draft checkpoint, or a draft in a GGUF file.

    The facts include what the draft adds to its target and, with --target, whether it fits. Only config
    files and the headers of weight files are read; no weights are loaded.

    \b
    Example:
      deepspec inspect pocket-dspark --target pocket
    """
    from deepspec.checkpoints.gguf_draft import inspect_gguf
    from deepspec.checkpoints.inspect import inspect_draft
    from deepspec.checkpoints.read import find_checkpoint
    from deepspec.targets import TargetSpec

    is_file = draft.endswith(".gguf")
    if not is_file:
        find_checkpoint(draft)  # a mistyped name should not wait for the Hub
    spec = None if target is None else TargetSpec.from_pretrained(target)
    found = inspect_gguf(Path(draft), spec) if is_file else inspect_draft(draft, spec)
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        if name not in ("reasons", "doubts"):
            shown = str(value) if name == "mask_token_id" and value is not None else _fact(value)
            stdout().print(Text(f"{name.replace('_', ' '):<36}{shown}"), soft_wrap=True)
    for sentence in found["reasons"]:
        stdout().print(Text(f"does not fit: {sentence}"), soft_wrap=True)
    for sentence in found["doubts"]:
        warn(sentence)


def _fact(value: Any) -> str:
    """A fact as text; "–" if there is none, or if the checkpoint does not contain it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
