"""`deepspec data cache`: the target's features on disk."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from deepspec.cli.common import Answers, Device, Json, load_target, print_json
from deepspec.errors import UserError, without_logins
from deepspec.log import note


def cache(
    words: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE… [KEY=VALUE…]", help="Recipes that the cache serves, and overrides."),
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of the cache.")],
    answers: Answers = None,
    dtype: Annotated[
        Literal["bf16", "fp8", "int8"],
        typer.Option(
            "--dtype", "--store", help="Number format; fp8 and int8 keep a scale per token and layer."
        ),
    ] = "bf16",
    limit: Annotated[
        int, typer.Option("--limit", "--max-rows", min=0, help="Read only the first N rows; 0: all.")
    ] = 0,
    shard_mb: Annotated[
        int, typer.Option(min=1, help="Size of a shard in MiB; a kill costs one at most.")
    ] = 256,
    device: Device = "auto",
    verify: Annotated[
        bool, typer.Option("--verify", help="Check finished shards too, and write damaged ones again.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the target's features to disk for training.

    Training then does not run the target again in every epoch. Only what the recipes' losses read is stored.
    The same command continues with the shards that are missing; under torchrun each process writes its share.

    \b
    Example:
      deepspec data cache pocket-dspark --answers answers.jsonl --out features
      deepspec train pocket-dspark --answers answers.jsonl data.features=cache:features
      torchrun --nproc-per-node 8 --no-python deepspec data cache dspark/qwen3-4b --out features --dtype fp8
    """
    from deepspec.config import load_recipe

    overrides = [w for w in words if "=" in w]
    names = [w for w in words if "=" not in w]
    if not names:
        raise UserError(
            "no recipe is given: it decides which layers and positions are stored",
            next_step="name one: deepspec data cache pocket-dspark --answers answers.jsonl --out features",
        )
    recipes = [load_recipe(name, overrides) for name in names]
    from deepspec.train.dist import launched

    rank, world = launched()
    if world > 1 and answers is None and recipes[0].data.train.startswith("pocket:"):
        raise UserError(
            "several processes would all answer the packaged prompts",
            next_step="have them answered once with `deepspec data regenerate`, and give --answers",
        )
    from deepspec.train.data import cache_features, check_cache

    check_cache(recipes, out, answers)
    plan, written = cache_features(
        recipes,
        out,
        target=load_target(recipes[0].target, device=device),
        answers=answers,
        dtype=dtype,
        max_rows=limit or None,
        shard_bytes=shard_mb * 2**20,
        verify=verify,
        rank=rank,
        world=world,
    )
    facts = {
        "out": str(out),
        "complete": written.complete,
        "rows": len(plan.rows),
        "tokens": plan.tokens,
        "shards": len(plan.shards),
        "bytes": plan.payload,
        "bytes_per_token": plan.payload / plan.tokens,
        "written_shards": written.shards,
        "written_bytes": written.bytes,
        **{key: plan.facts[key] for key in ("dtype", "layers", "reads")},
    }
    if as_json:
        print_json(facts)
    elif written.complete:
        typer.echo(
            f"{out}: complete, {written.shards} of {len(plan.shards)} shards written now, "
            f"{facts['bytes_per_token']:,.0f} bytes per token"
        )
        train = ["deepspec", "train", names[0], *overrides, *(["--answers", str(answers)] if answers else [])]
        typer.echo(without_logins(f"next: {shlex.join([*train, f'data.features=cache:{out}'])}"))
    else:
        note(f"{out}: this process's shards are written; other processes are still writing", style="yellow")
