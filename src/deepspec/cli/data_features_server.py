"""`deepspec data features-server`: the command that starts a server of features."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from deepspec.cli.common import Json, print_json
from deepspec.log import note


class FeatureServer(StrEnum):
    vllm = "vllm"
    sglang = "sglang"


PORTS = {FeatureServer.vllm: 8000, FeatureServer.sglang: 30000}
"""What each server listens on unless told otherwise."""


def features_server(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or the path of a .yaml file.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Such as target=DIRECTORY.")
    ] = None,
    server: Annotated[FeatureServer, typer.Option("--server", help="Which server.")] = FeatureServer.vllm,
    storage: Annotated[
        Path | None,
        typer.Option("--storage", help="vLLM: folder for features in transit, seen by both sides."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the command line of a vLLM or SGLang that gives a recipe its features.

    Not verified on a real server: written from the released source of vLLM 0.33.0 and SGLang 0.5.23.

    \b
    Example:
      deepspec data features-server dspark/qwen3-4b --server vllm
    """
    from deepspec.config import load_recipe

    settings = load_recipe(recipe, overrides or [])
    from deepspec.features.launch import (
        STORAGE,
        sglang_command,
        stream_ids,
        vllm_command,
    )
    from deepspec.maths.blocks import with_last_hidden
    from deepspec.pocket import packaged
    from deepspec.targets import TargetSpec
    from deepspec.train.build import draft_spec, read_rules

    target = TargetSpec.from_pretrained(settings.target)
    layers = draft_spec(settings, target.config, settings.draft.mask_token_id or 0).target_layer_ids
    model, length = packaged(settings.target), settings.data.max_length
    last_hidden = with_last_hidden(read_rules(settings))
    if server is FeatureServer.sglang:
        command = sglang_command(model, layers, last_hidden=last_hidden, max_length=length)
    else:
        command = vllm_command(
            model,
            layers,
            target.num_layers,
            last_hidden=last_hidden,
            max_length=length,
            storage=str(storage or STORAGE),
        )
    words = ["deepspec", "train", recipe, *(overrides or [])]
    words.append(f"data.features={server.value}:http://localhost:{PORTS[server]}")
    if as_json:
        streams = stream_ids(layers, target.num_layers, last_hidden)
        print_json(
            {"command": command, "layers": list(layers), "streams": streams, "train": shlex.join(words)}
        )
        return
    typer.echo(command)
    note("not verified on a real server. Where it listens, train with")
    typer.echo(shlex.join(words))
