"""`deepspec recommend`: how many proposals to verify at which load, and whether to speculate at all."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from deepspec.cli.common import Json, numbers, print_json, stdout, table_of
from deepspec.errors import DataError, MismatchError, UserError
from deepspec.log import note

if TYPE_CHECKING:
    from deepspec.cost.acceptance import Acceptance
    from deepspec.cost.recommend import Cell, Choice
    from deepspec.drafts.spec import DraftSpec
    from deepspec.schedule.costs import StepCosts

Server = StrEnum("Server", ["vllm", "sglang", "llamacpp"])


def recommend(
    draft: Annotated[
        str, typer.Argument(metavar="DRAFT", help="A draft, or the recipe of one that is not trained yet.")
    ],
    target: Annotated[str | None, typer.Option(help="The model; by default pocket, or the recipe's.")] = None,
    costs: Annotated[Path | None, typer.Option(help="Step costs of `deepspec profile`.")] = None,
    machine: Annotated[
        str | None, typer.Option(help="Without step costs: estimate them for rtx4090, h100, …")
    ] = None,
    results: Annotated[Path | None, typer.Option(help="Acceptance from `deepspec eval --out`.")] = None,
    counters: Annotated[
        str | None,
        typer.Option(help="Acceptance from a server: its address, its /metrics text, or SGLang's answers."),
    ] = None,
    domain: Annotated[
        list[str] | None, typer.Option(help="Published acceptance of this domain; may be repeated.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Also a schedule by calibrated confidence.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="Of several in --results.")] = None,
    users: Annotated[str, typer.Option(help="Requests in flight, such as 1,8,32.")] = "1,8,32",
    prompt_tokens: Annotated[float, typer.Option(min=1, help="Mean length of a prompt.")] = 256,
    answer_tokens: Annotated[float, typer.Option(min=2, help="Mean length of an answer.")] = 256,
    least_speed: Annotated[float, typer.Option(min=0, help="Tokens/s that each user needs.")] = 0.0,
    watts: Annotated[float | None, typer.Option(min=0, help="The machine's power, if not measured.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of a kWh.")] = None,
    to: Annotated[Server, typer.Option(help="The server to launch.")] = Server.vllm,
    elsewhere: Annotated[
        bool, typer.Option("--elsewhere", help="Take step costs that another machine measured.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say how many proposals to verify at which load, and whether to speculate at all.

    Acceptance times step costs give the tokens/s of every choice at each number of users. Acceptance comes
    from an evaluation, from a server's counters, or from a publication: then nothing has to be trained first.

    \b
    Example:
      deepspec recommend dspark/qwen3-4b --machine h100 --users 1,16,128
    """
    from deepspec.cost.acceptance import read_calibration, thresholds
    from deepspec.cost.recommend import Load, beyond, break_even, choices, plain, rehearsal

    loads = [Load(n, prompt_tokens, answer_tokens) for n in numbers(users, "--users") or ()]
    if costs is not None and machine is not None:
        raise UserError("--costs is measured, and --machine is estimated", next_step="give one of them")
    spec, name, facts = _draft(draft, target)
    most = facts["context"]
    if most is not None and prompt_tokens + answer_tokens > most:
        raise DataError(
            f"{prompt_tokens:g} tokens of a prompt and {answer_tokens:g} of its answer are more than the "
            f"{most} that {name} holds",
            next_step="give shorter --prompt-tokens or --answer-tokens",
        )
    table = _costs(costs, machine, elsewhere, facts, spec, name, draft)
    accepted = _acceptance(results, counters, domain or [], temperature, facts, spec, name, draft)
    scheduled: list[tuple[float, float]] = []
    if calibration is not None:
        of = table.identity.draft_hash
        scheduled = thresholds(read_calibration(calibration, of, spec.proposals))
    ranked = {
        load.users: choices(
            table,
            accepted,
            load,
            scheduled=scheduled,
            watts=table.watts if watts is None else watts,
            price=price,
            least=least_speed,
        )
        for load in loads
    }
    cells = break_even(table, accepted)
    lengths = {_length(found[0], spec.proposals) for found in ranked.values()}
    notes = [f"acceptance: {accepted.source}", *table.notes]
    if to is Server.sglang and spec.algorithm != "eagle3" and lengths - {0, spec.proposals}:
        notes.append(f"SGLang verifies whole blocks: the commands verify all {spec.proposals} proposals")
    notes += dict.fromkeys(line for load in loads for line in beyond(table, load))
    launch = {n: _launch(to, spec, name, draft, found[0]) for n, found in ranked.items()}
    pretended = {n: rehearsal(accepted, _length(found[0], spec.proposals)) for n, found in ranked.items()}
    if as_json:
        print_json(
            {
                "acceptance": {"survival": accepted.survival, "tau": accepted.tau, "source": accepted.source},
                "choices": plain(ranked),
                "break_even": [cell._asdict() for cell in cells],
                "launch": launch,
                "rehearsal": pretended,
                "notes": notes,
            }
        )
        return
    for n, found in ranked.items():
        _print(n, found, launch[n], pretended[n], to)
    _print_map(cells)
    for sentence in notes:
        note(sentence)


def _draft(draft: str, target: str | None) -> tuple[DraftSpec, str, dict[str, Any]]:
    """(its spec, its target's name, what else is known of them) of a draft, or of a recipe's."""
    from deepspec.checkpoints.draft import check_draft
    from deepspec.config import load_recipe
    from deepspec.planning import describe, target_facts
    from deepspec.targets import TargetSpec

    if _is_recipe(draft):
        recipe = load_recipe(draft)
        name = target or recipe.target
        config = target_facts(name)[0]
        spec, own = describe(recipe, config)
        context = config.get("max_position_embeddings")
        return spec, name, {"config": config, "own": own, "hash": None, "context": context}
    name = target or "pocket"
    known = TargetSpec.from_pretrained(name)
    facts = {"config": known.config, "own": None, "hash": known.config_hash, "context": known.context_length}
    return check_draft(draft, known), name, facts


def _costs(
    path: Path | None,
    machine: str | None,
    elsewhere: bool,
    facts: dict[str, Any],
    spec: DraftSpec,
    target: str,
    draft: str,
) -> StepCosts:
    from deepspec.checkpoints.inspect import parameters
    from deepspec.cost.dimensions import draft_dimensions, target_dimensions
    from deepspec.cost.estimate import estimated
    from deepspec.cost.machines import MACHINES
    from deepspec.drafts import ALGORITHMS
    from deepspec.errors import nearest
    from deepspec.schedule.costs import AGAIN, read_costs
    from deepspec.this_machine import this_machine

    if path is not None:
        found = read_costs(path, target=facts["hash"])
        of = found.identity
        if of.source == "measured" and not elsewhere:
            read_costs(path, machine=this_machine())
        if of.block is not None and of.block != spec.proposals:
            raise MismatchError(
                f"these step costs are of a draft with γ = {of.block} ({of.draft}); {draft} proposes "
                f"{spec.proposals}",
                where=str(path),
                next_step=AGAIN,
            )
        return found
    row = MACHINES.get(machine or "")
    if row is None:
        close = nearest(machine or "", MACHINES)
        raise UserError(
            "there are no step costs"
            if machine is None
            else f"there is no machine {machine!r}" + (f"; did you mean {close}?" if close else ""),
            next_step=f"{AGAIN}, then add --costs FILE; or estimate with --machine {'|'.join(MACHINES)}",
        )
    own = facts["own"] if facts["own"] is not None else parameters(spec)[0]
    names = target_dimensions(facts["config"]) | draft_dimensions(spec, own, "bfloat16")
    passes = ALGORITHMS[spec.algorithm].passes(spec.block)
    return estimated(row, names, target=target, draft=draft, block=spec.proposals, passes=passes)


def _acceptance(
    results: Path | None,
    counters: str | None,
    domains: list[str],
    temperature: float | None,
    facts: dict[str, Any],
    spec: DraftSpec,
    target: str,
    draft: str,
) -> Acceptance:
    from deepspec.cost.acceptance import from_counters, from_results, published

    if results is not None and counters is not None:
        raise UserError("--results and --counters both give the acceptance", next_step="give one of them")
    if results is not None:
        name = Path(draft).name
        return from_results(
            results, name, block=spec.proposals, target_hash=facts["hash"], temperature=temperature
        )
    if counters is None:
        return published(target, spec.algorithm, domains)
    if "://" in counters:
        from deepspec.measure.serving import metrics_of

        return from_counters(metrics_of(counters), counters, spec.proposals)
    try:
        text = Path(counters).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the counters cannot be read: {error}", where=counters) from error
    return from_counters(text, counters, spec.proposals)


def _length(choice: Choice, block: int) -> int:
    """Proposals per round that a server is told to make: all of them if confidence decides."""
    return block if choice.name == "scheduled" else round(choice.verified)


def _launch(to: Server, spec: DraftSpec, target: str, draft: str, choice: Choice) -> list[str]:
    """The commands that serve the best choice."""
    from deepspec.checkpoints.servers import launch_commands
    from deepspec.pocket import packaged

    length, planned = _length(choice, spec.proposals), _is_recipe(draft)
    trained = f"runs/{Path(draft).stem}" if planned else draft
    out = Path(f"{Path(trained).name}-{to.value}")
    lines = launch_commands(to.value, spec, packaged(target), out, proposals=length)
    export = f"deepspec export {trained} --to {to.value} --target {target} --out {out}"
    training = [f"deepspec train {draft}"] if planned else []
    return [*training, export, *lines] if length else lines


def _is_recipe(draft: str) -> bool:
    """A ready-made draft has the name of the recipe that it was trained with; the draft is meant."""
    from deepspec.pocket import DRAFTS
    from deepspec.recipe_files import recipe_names

    return draft not in DRAFTS and (draft in recipe_names() or draft.endswith((".yaml", ".yml")))


def _print(n: int, found: list[Choice], launch: list[str], pretended: dict[str, Any], to: Server) -> None:
    energy = {"J/token": [c.joules for c in found], "per M tokens": [c.cost for c in found]}
    shown = {head: column for head, column in energy.items() if None not in column}
    table = table_of("choice", "verified", "accepted", "tokens/s", "interval", "per user", *shown)
    for i, choice in enumerate(found):
        interval = f"{choice.low:.4g}–{choice.high:.4g}" if choice.low < choice.high else "–"
        table.add_row(
            choice.name + ("" if choice.pays else " (slow)"),
            f"{choice.verified:.1f}",
            f"{choice.accepted:.2f}",
            f"{choice.tokens_per_s:.4g}",
            interval,
            f"{choice.per_user:.3g}",
            *(f"{column[i]:.3g}" for column in shown.values()),
        )
    table.title, table.title_justify = f"{n} user{'s' * (n > 1)}", "left"
    console = stdout()
    console.print(table)
    best = found[0]
    plain = next(choice for choice in found if choice.name == "none")
    gain = best.tokens_per_s / plain.tokens_per_s
    verdict = (
        "don't speculate here" if best is plain else f"{best.name}: {gain:.2f} × as fast as without a draft"
    )
    if not best.pays:
        verdict += "; no choice gives each user the speed asked for"
    console.print(Text(verdict))
    for line in launch:
        typer.echo(line)
    if best is not plain and to.value in pretended:
        typer.echo(f"to rehearse this acceptance: {json.dumps(pretended[to.value])}")


def _print_map(cells: list[Cell]) -> None:
    contexts = list(dict.fromkeys(cell.context for cell in cells))
    table = table_of("rows", *(f"{context} tokens" for context in contexts))
    for rows in dict.fromkeys(cell.rows for cell in cells):
        line = [cell for cell in cells if cell.rows == rows]
        table.add_row(
            str(rows), *(f"fixed:{c.length} ({c.speedup:.2f} ×)" if c.length else "none" for c in line)
        )
    table.title, table.title_justify = (
        "best fixed length by rows in flight and context, prompts left out",
        "left",
    )
    stdout().print(table)
