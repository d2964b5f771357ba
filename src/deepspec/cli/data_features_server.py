"""`deepspec data features-server`: the command that starts a server of features."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from deepspec.cli.common import Json, Overrides, RecipeName, print_json
from deepspec.errors import without_logins
from deepspec.log import note


def features_server(
    recipe: RecipeName,
    overrides: Overrides = None,
    storage: Annotated[
        Path | None,
        typer.Option(help="Folder for features on their way; server and training see it under this name."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the command that starts a vLLM server of features.

    The server runs the recipe's target, and training reads its hidden states from there. The command was
    written from the released source of vLLM 0.33.0 and is not verified on a real server.

    \b
    Example:
      deepspec data features-server dspark/qwen3-4b
    """
    from deepspec.config import load_recipe

    settings = load_recipe(recipe, overrides or [])
    from deepspec.features.vllm_layers import STORAGE, server_layers, vllm_command
    from deepspec.maths.blocks import with_last_hidden
    from deepspec.pocket import packaged
    from deepspec.targets import TargetSpec
    from deepspec.train.build import draft_spec, read_rules

    target = TargetSpec.from_pretrained(settings.target)
    layers = draft_spec(settings, target.config, settings.draft.mask_token_id or 0).target_layer_ids
    streams = server_layers(layers, target.num_layers, with_last_hidden(read_rules(settings)))
    longest, folder = settings.data.max_length, str(storage or STORAGE)
    command = vllm_command(packaged(settings.target), streams, longest, folder, target.context_length)
    words = ["deepspec", "train", recipe, *(overrides or []), "data.features=vllm:http://localhost:8000"]
    train = without_logins(shlex.join(words))
    if as_json:
        print_json({"command": command, "layers": list(layers), "streams": streams, "train": train})
        return
    typer.echo(command)
    note("This command is not verified on a real server. Once the server listens, train with")
    typer.echo(train)
