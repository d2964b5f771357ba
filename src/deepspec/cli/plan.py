"""plan: what a recipe takes, before anything runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from deepspec.cli.common import Json, print_json, stdout, table_of
from deepspec.errors import UserError, nearest
from deepspec.log import note, warn

if TYPE_CHECKING:
    from deepspec.config import Recipe
    from deepspec.cost import Change, Choices, Counts, Machine, Plan
    from deepspec.cost.costs import Figure
    from deepspec.cost.phases import Speeds
    from deepspec.cost.room import Need

QUICKSTART = "quickstart"
DEFAULT_MACHINE = "h100"
NO_CHANGE = "use a smaller target or more memory: no change of the recipe makes it fit here"
ELSEWHERE = (
    "make room, or plan for another disk with --cache-dir DIR and run `deepspec quickstart --out DIR/…`"
)
PUBLISHED_ANSWER, POCKET_ANSWER = 751.0, 60.0
"""Tokens assumed for an answer that is not there yet: the means of the published set and of the pocket's."""


class Features(StrEnum):
    online = "online"
    cache = "cache"


class Store(StrEnum):
    bf16 = "bf16"
    fp8 = "fp8"
    int8 = "int8"


class Positions(StrEnum):
    all = "all"
    read = "read"


class Engine(StrEnum):
    process = "process"
    server = "server"


def plan(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe's name or path, or `quickstart`.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Such as data.max_length=2048.")
    ] = None,
    machine: Annotated[
        str | None, typer.Option("--machine", help="A row of data such as h100, or `here`, measured.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine anew.")] = False,
    watts: Annotated[float | None, typer.Option("--watts", min=0, help="At full load.")] = None,
    share: Annotated[
        float | None, typer.Option("--share", min=0.01, max=1, help="Of the machine's peak, as reached.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", exists=True, dir_okay=False, help="Answers or prompts instead of data.train."),
    ] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="Of the training set.")] = None,
    prompt_tokens: Annotated[
        float | None, typer.Option("--prompt-tokens", min=1, help="Of a prompt, on average.")
    ] = None,
    answer_tokens: Annotated[
        float | None, typer.Option("--answer-tokens", min=1, help="Of an answer, on average.")
    ] = None,
    features: Annotated[
        Features | None, typer.Option("--features", help="Where from; by default as the recipe says.")
    ] = None,
    store: Annotated[Store, typer.Option("--store", help="Number format of a cache.")] = Store.bf16,
    positions: Annotated[
        Positions, typer.Option("--positions", help="In a cache: what the loss reads, or all as published.")
    ] = Positions.read,
    cache_dir: Annotated[
        Path, typer.Option("--cache-dir", help="On the disk that has to hold it all.")
    ] = Path("."),
    engine: Annotated[
        Engine, typer.Option("--engine", help="What answers: this process, or an inference server.")
    ] = Engine.process,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Answers decoded together; 16, of a server 256.")
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Of the quickstart.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Every formula with its numbers.")] = False,
    as_json: Json = False,
) -> None:
    """Say what a recipe takes before anything runs: bytes, memory, operations, hours and energy.

    Refuses what cannot fit (exit code 2), and names the cheapest change that makes it fit.

    \b
    Example:
      deepspec plan dspark/qwen3-4b --machine rtx4090 --explain
      deepspec plan quickstart --fast
    """
    from deepspec.cost import Choices, make_plan

    choices = Choices.answering(
        engine.value,
        batch,
        features="online" if features is None else features.value,
        store=store.value,
        positions=positions.value,
        free_disk=free_bytes(cache_dir),
    )
    if recipe == QUICKSTART:
        ignored = (overrides, data, rows, prompt_tokens, answer_tokens, share, batch)
        if any(given is not None for given in ignored) or machine not in (None, "here"):
            raise UserError(
                "the quickstart is planned as it is, on this machine",
                next_step="leave out overrides, counts and machines; --fast, --measure, --explain go with it",
            )
        _plan_quickstart(fast, choices, watts, measure, explain, as_json)
        return
    from deepspec.config import feature_source, load_recipe

    settings = load_recipe(recipe, overrides or [])
    if features is None and feature_source(settings.data.features)[0] == "cache":
        choices = replace(choices, features="cache")
    config, tokenizer, notes = target_facts(settings.target)
    row, speeds = chosen_machine(settings, machine, measure, data)
    if settings.data.train.startswith("pocket:") and data is None and batch is None:
        from deepspec.answers.in_process import PACKAGED_ROWS

        choices = replace(choices, batch=PACKAGED_ROWS)  # `train` answers these itself
    if speeds is not None and answer_tokens is None:
        answer_tokens = sum(speeds.answers) / len(speeds.answers)
    counts = training_counts(settings, tokenizer, data, rows, prompt_tokens, answer_tokens)
    counts = replace(counts, notes=(*notes, *counts.notes))
    choices = replace(choices, answered=counts.answered)
    found = make_plan(settings, config, counts, overridden(row, watts, share), choices, speeds)
    show_plan(found, config, counts, explain, as_json)


# ── where the inputs come from ────────────────────────────────────────────────────────────────────────


def free_bytes(folder: Path) -> float:
    """On the disk of a folder that may not be there yet. Raises UserError."""
    there = next((p for p in (folder, *folder.resolve().parents) if p.exists()), folder)
    try:
        return float(shutil.disk_usage(there).free)
    except OSError as error:
        raise UserError(f"--cache-dir {folder}: {error.strerror or error}") from error


def target_facts(name: str) -> tuple[dict[str, Any], Any, list[str]]:
    """(raw text config, tokenizer or None, notes). Published targets are known without a network.

    Raises TargetError for any other that is neither here nor to be had from the Hub.
    """
    from deepspec.families import PUBLISHED_TARGETS
    from deepspec.targets import TargetSpec

    if name in PUBLISHED_TARGETS and not Path(name).is_dir():
        return PUBLISHED_TARGETS[name], None, [f"dimensions of {name} as they ship with this package"]
    spec = TargetSpec.from_pretrained(name)
    return spec.config, spec.tokenizer(), []


def training_counts(
    recipe: Recipe,
    tokenizer: Any,
    data: Path | None,
    rows: int | None,
    prompt_tokens: float | None,
    answer_tokens: float | None,
) -> Counts:
    """Counted from the file of the recipe or of --data, assumed where there is none."""
    from deepspec.cost.counts import PUBLISHED_PROMPT, assumed_counts, count_file, published_counts

    path = data or data_path(recipe.data.train)
    answer = answer_tokens or (POCKET_ANSWER if recipe.target == "pocket" else PUBLISHED_ANSWER)
    if path.is_file():
        counts = count_file(path, tokenizer, thinking=recipe.thinking, answer=answer)
        return counts if rows is None else counts.of(rows)
    if data is None and prompt_tokens is None and answer_tokens is None:
        published = published_counts()
        return published if rows is None else published.of(rows)
    return assumed_counts(rows or 10_000, prompt_tokens or PUBLISHED_PROMPT, answer)


def data_path(name: str) -> Path:

    from deepspec.pocket import prompts_path

    return prompts_path(name)


def chosen_machine(
    recipe: Recipe, name: str | None, again: bool, data: Path | None
) -> tuple[Machine, Speeds | None]:
    """The row asked for; this machine, measured, where the target's weights are here and none was."""
    from deepspec.cost import MACHINES
    from deepspec.pocket import packaged

    if name is None:
        local = Path(packaged(recipe.target)).is_dir()
        name = "here" if local else DEFAULT_MACHINE
        if not local:
            note(f"planned for {name}; other machines: --machine {'|'.join(MACHINES)}, or here to measure")
    if name != "here":
        if name not in MACHINES:
            close = nearest(name, MACHINES)
            raise UserError(
                f"no machine {name!r}" + (f"; did you mean {close}?" if close else ""),
                next_step=f"there are {', '.join(MACHINES)}, and `here`, which is measured",
            )
        return MACHINES[name], None
    from deepspec.speeds import here

    return here(), measured([recipe], again, data or data_path(recipe.data.train), 16, 256)


def overridden(row: Machine, watts: float | None, share: float | None = None) -> Machine:
    row = row if watts is None else row._replace(watts=watts)
    return row if share is None else row._replace(share=share)


def measured(
    recipes: list[Recipe],
    again: bool,
    prompts: Path,
    slots: int,
    max_new_tokens: int,
    ready_made: Mapping[str, str] | None = None,
) -> Speeds:
    """What was measured here before, or now."""
    from deepspec.data.conversations import read_conversations
    from deepspec.measure.evaluate import spread
    from deepspec.speeds import SAMPLES, kept_speeds, measure
    from deepspec.this_machine import busy

    name = recipes[0].target
    kept = None if again else kept_speeds(name, recipes)
    if kept is not None and (kept.methods or not ready_made):
        return kept
    note("measuring this machine with this target; about a minute")
    if (load := busy()) is not None:
        cores = os.cpu_count()
        warn(
            f"the machine was busy in the last minute (load {load:.1f} on {cores} cores): if it still is, "
            "what is measured now is too slow, and kept; --measure measures again"
        )
    some = spread(list(islice(read_conversations(prompts), 4000)), SAMPLES[0])
    return measure(name, recipes, some, slots=slots, max_new_tokens=max_new_tokens, ready_made=ready_made)


# ── showing ───────────────────────────────────────────────────────────────────────────────────────────


def show_plan(found: Plan, config: dict[str, Any], counts: Counts, explain: bool, as_json: bool) -> None:
    """Print a plan; raises UserError, with the cheapest change, where it does not fit."""
    from deepspec.cost import cheapest_change

    change = None if found.fits else cheapest_change(found, config, counts)
    if as_json:
        words = None if change is None else {"add": list(change.words), "costs": change.cost}
        print_json(found.plain() | {"change": words})
    else:
        stdout().print(*section_tables(found.sections, explain), needs_table(found.needs))
        for sentence in found.notes:
            note(f"note: {sentence}")
    if not found.fits:
        raise refusal(f"{found.recipe.name} on {found.machine.name}", found.needs, change)


def refusal(
    where: str, needs: Iterable[Need], change: Change | None, otherwise: str = NO_CHANGE
) -> UserError:
    over = [f"{n.what}: {size(n.wants)} wanted, {size(n.has)} there" for n in needs if not n.fits]
    if change is None:
        return UserError(
            f"this does not fit: {'; '.join(over)}",
            where=where,
            next_step=otherwise,
        )
    then = ", ".join(f"{n.what} {size(n.wants)} of {size(n.has)}" for n in change.plan.needs)
    return UserError(
        f"this does not fit: {'; '.join(over)}",
        where=where,
        next_step=f"add {' '.join(change.words)}  (costs {change.cost}; then {then})",
    )


def _plan_quickstart(
    fast: bool, choices: Choices, watts: float | None, again: bool, explain: bool, as_json: bool
) -> None:
    """The quickstart's own phases, on this machine."""
    from deepspec import demo as w
    from deepspec.cost.quickstart import quickstart_needs, quickstart_phases, quickstart_plans
    from deepspec.speeds import here

    recipes, sizes = w.quickstart_recipes(fast), w.QUICKSTART[fast]
    speeds = measured(
        list(recipes.values()),
        again,
        w.prompts_path("pocket:train"),
        w.PACKAGED_ROWS,
        w.PACKAGED_TOKENS,
        {algorithm: f"pocket-{algorithm}" for algorithm in w.LEARNING_RATE},
    )
    config, _, _ = target_facts("pocket")
    row = overridden(here(), watts)
    plans = quickstart_plans(recipes, config, sizes.prompts, row, choices, speeds)
    phases = quickstart_phases(
        plans,
        speeds,
        prompts=sizes.prompts,
        slots=w.PACKAGED_ROWS,
        tasks=[*sizes.tasks.values()],
        new_tokens=w.EVALUATED_TOKENS,
    )
    needs = quickstart_needs(plans)
    if as_json:
        print_json(
            {
                "phases": {name: each.plain() for name, each in phases.items()},
                "plans": {name: each.plain() for name, each in plans.items()},
                "needs": [each.plain() for each in needs],
                "fits": all(each.fits for each in needs),
            }
        )
    else:
        stdout().print(*section_tables({"quickstart, by phase": phases}, explain), needs_table(needs))
        note(f"all: {sum(map(float, phases.values())) / 60:.1f} minutes on {speeds.machine}")
    if not all(each.fits for each in needs):
        raise refusal("the quickstart on this machine", needs, None, ELSEWHERE)


def section_tables(sections: Mapping[str, Mapping[str, Figure]], explain: bool) -> Iterator[Table]:
    for title, figures in sections.items():
        table = table_of(title, "")
        for name, each in figures.items():
            table.add_row(Text(name), Text(amount(each)))
            if explain:
                table.add_row(Text(f"  {each.formula}\n  = {each.numbers}", style="dim"), Text(""))
        yield table


def needs_table(needs: Iterable[Need]) -> Table:
    table = table_of("has to fit", "wanted", "there", "")
    for need in needs:
        verdict = "fits" if need.fits else "does not fit"
        table.add_row(need.what, size(need.wants), size(need.has), verdict)
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
