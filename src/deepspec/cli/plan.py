"""`deepspec plan`: what a recipe needs, estimated before anything runs."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from deepspec.cli.common import Json, Overrides, RecipeName, data_file, print_json, stdout, table_of
from deepspec.errors import UserError
from deepspec.log import note

if TYPE_CHECKING:
    from deepspec.cost.fit import Change
    from deepspec.cost.formulas import Figure
    from deepspec.cost.plan import Plan
    from deepspec.cost.sizes import Need


def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    machine: Annotated[
        str | None, typer.Option(help="rtx4090, h100 and so on, or `here`, which is measured.")
    ] = None,
    gpus: Annotated[
        int, typer.Option("--gpus", min=1, help="Accelerators of one host that train together (torchrun).")
    ] = 1,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine again.")] = False,
    watts: Annotated[float | None, typer.Option(min=0, help="The machine's power at full load.")] = None,
    share: Annotated[
        float | None,
        typer.Option(min=0.01, max=1, help="Share of its peak speed that the machine reaches."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            parser=data_file,
            metavar="FILE",
            help="Count these answers or prompts, not the recipe's data.train.",
        ),
    ] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Number of training rows.")] = None,
    prompt_tokens: Annotated[float | None, typer.Option(min=1, help="Mean length of a prompt.")] = None,
    answer_tokens: Annotated[float | None, typer.Option(min=1, help="Mean length of an answer.")] = None,
    features: Annotated[
        Literal["online", "cache"] | None,
        typer.Option("--features", help="Where the features come from; by default as the recipe says."),
    ] = None,
    store: Annotated[
        Literal["bf16", "fp8", "int8"], typer.Option("--store", help="Number format of a cache.")
    ] = "bf16",
    cache_dir: Annotated[
        Path, typer.Option("--cache-dir", help="A folder on the disk that will hold everything.")
    ] = Path("."),
    engine: Annotated[
        Literal["process", "server"],
        typer.Option("--engine", help="Where the target answers: in process, or in an inference server."),
    ] = "process",
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Number of prompts answered together (16, or 256 in a server)."),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show every formula with its numbers.")] = False,
    as_json: Json = False,
) -> None:
    """Estimate what a recipe needs before you run it.

    The plan has bytes, memory, operations, hours and energy. What cannot fit is refused (exit code 2), with
    the cheapest change that makes it fit. No weights are needed, except to measure `here`. The dimensions of
    the Qwen3 targets ship with deepspec; other targets' config.json is read from a directory or the Hub.

    \b
    Example:
      deepspec plan dspark/qwen3-4b --machine rtx4090 --explain
    """
    from deepspec.config import load_recipe
    from deepspec.cost.fit import cheapest_change
    from deepspec.cost.plan import make_plan
    from deepspec.planning import prepare

    inputs, source = prepare(
        load_recipe(recipe, overrides or []),
        machine,
        again=measure,
        watts=watts,
        share=share,
        data=data,
        rows=rows,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        features=features,
        store=store,
        engine=engine,
        batch=batch,
        free_disk=free_bytes(cache_dir),
        gpus=gpus,
    )
    found = make_plan(inputs, source)
    change = None if found.fits else cheapest_change(inputs)
    if as_json:
        words = None if change is None else {"add": list(change.words), "costs": change.cost}
        print_json(found.plain() | {"change": words})
    else:
        stdout().print(*section_tables(found.sections, explain), needs_table(found.needs))
        for sentence in found.notes:
            note(f"note: {sentence}")
    if not found.fits:
        raise refusal(found, change)


def free_bytes(folder: Path) -> float:
    """Free bytes on the disk of a folder that need not exist yet. Raises UserError."""
    there = next((p for p in (folder, *folder.resolve().parents) if p.exists()), folder)
    try:
        return float(shutil.disk_usage(there).free)
    except OSError as error:
        raise UserError(f"--cache-dir {folder}: {error.strerror or error}") from error


def refusal(found: Plan, change: Change | None) -> UserError:
    """The error of a plan that does not fit, with the change that makes it fit."""
    over = "; ".join(
        f"{n.what}: {size(n.wants)} needed, {size(n.has)} available" for n in found.needs if not n.fits
    )
    next_step = (
        "use a smaller target or a machine with more memory; no change of the recipe makes it fit here"
    )
    if change is not None:
        then = ", ".join(f"{n.what} {size(n.wants)} of {size(n.has)}" for n in change.needs)
        next_step = f"add {' '.join(change.words)}  (it costs {change.cost}; then {then})"
    where = f"{found.inputs.recipe.name} on {found.inputs.machine.name}"
    return UserError(f"this does not fit: {over}", where=where, next_step=next_step)


def section_tables(sections: Mapping[str, Mapping[str, Figure]], explain: bool) -> Iterator[Table]:
    for title, figures in sections.items():
        table = table_of(title, "")
        for name, each in figures.items():
            table.add_row(Text(name), Text(amount(each)))
            if explain:
                table.add_row(Text(f"  {each.formula}\n  = {each.numbers}", style="dim"), Text(""))
        yield table


def needs_table(needs: Iterable[Need]) -> Table:
    table = table_of("does it fit?", "needed", "available", "")
    for need in needs:
        table.add_row(need.what, size(need.wants), size(need.has), "fits" if need.fits else "does not fit")
    return table


def size(count: float) -> str:
    """Bytes with three digits: 38.0 TB, 30.7 kB."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def amount(each: Figure) -> str:
    """A figure's value as people read it."""
    value = each.value
    if each.unit == "bytes":
        return size(value)
    if each.unit == "s":
        return f"{value / 3600:,.1f} h" if value >= 7200 else f"{value:,.1f} s"
    if each.unit == "kWh":
        return f"{value:,.0f} kWh" if value >= 100 else f"{value:.3g} kWh"
    if each.unit == "FLOPs":
        return f"{value:.3g} FLOPs"
    return f"{value:,.0f} {each.unit}" if each.unit else f"{value:.3g}"
