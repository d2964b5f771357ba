"""`deepspec profile`: what a round of decoding takes on this machine, or on a server."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deepspec.cli.common import (
    Device,
    Dtype,
    Json,
    TargetDtype,
    TargetName,
    load_target,
    numbers,
    print_json,
    sampling_of,
    stdout,
    table_of,
)
from deepspec.errors import UserError
from deepspec.files import check_writable
from deepspec.log import note, warn

if TYPE_CHECKING:
    from deepspec.schedule.costs import StepCosts

Server = StrEnum("Server", ["sglang"])


def profile(
    draft: Annotated[
        str | None,
        typer.Argument(metavar="[DRAFT]", help="Without one: the target alone."),
    ] = None,
    target: TargetName = "pocket",
    rows: Annotated[str | None, typer.Option(help="Rows in flight, such as 1,2,4,8,16,32.")] = None,
    widths: Annotated[str | None, typer.Option(help="New tokens per row, such as 1,2,4,8.")] = None,
    contexts: Annotated[str | None, typer.Option(help="Tokens held per row, such as 64,256.")] = None,
    sweeps: Annotated[int, typer.Option(min=3, help="How often each point is measured, at most.")] = 7,
    seconds: Annotated[float, typer.Option(min=0, help="No sweep begins later, once three are done.")] = 60,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 1.0,
    dtype: TargetDtype = Dtype.auto,
    device: Device = "auto",
    server: Annotated[
        str | None, typer.Option(metavar="URL", help="Measure this OpenAI-compatible server instead.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The table.")] = Path("costs.json"),
    to: Annotated[Server | None, typer.Option(help="Also write it as this server reads it.")] = None,
    as_json: Json = False,
) -> None:
    """Measure what a round of decoding takes, by rows, tokens and context.

    The table says what the target's pass and the draft's proposals take on this machine, and what verifying
    one more token costs; `deepspec recommend` and the policies read it. Points are measured in turns, and the
    means are kept. After Ctrl-C or a kill the same command continues.

    \b
    Example:
      deepspec profile pocket-dspark --target pocket --out costs.json --to sglang
    """
    check_writable(out)
    axes = {"rows": numbers(rows, "--rows"), "widths": numbers(widths, "--widths")}
    axes |= {"contexts": numbers(contexts, "--contexts")}
    given = {name: axis for name, axis in axes.items() if axis is not None}
    from deepspec.schedule.costs import write_costs

    if server is not None:
        costs = _of_server(server, given, draft, to)
        write_costs(out, costs)
    else:
        from deepspec.checkpoints.draft import check_draft, load_draft
        from deepspec.measure.profile import Grid
        from deepspec.measure.profile import profile as measured
        from deepspec.targets import TargetSpec
        from deepspec.this_machine import busy

        sampling = sampling_of(temperature)
        if draft is not None:
            check_draft(draft, TargetSpec.from_pretrained(target))
        if (load := busy()) is not None:
            warn(f"the machine is busy (load {load:.1f}): the measured times may be too long")
        model = load_target(target, dtype.value, device)
        costs = measured(
            model,
            None if draft is None else load_draft(draft, model),
            Grid(**given),
            sampling=sampling,
            sweeps=sweeps,
            seconds=seconds,
            out=out,
        )
    note(f"step costs: {out}")
    if to is not None:
        _write_sps(costs, out)
    print_json(costs.record()) if as_json else _print(costs)


def _of_server(
    url: str, given: dict[str, tuple[int, ...]], draft: str | None, to: Server | None
) -> StepCosts:
    from deepspec.measure.serving import ROWS, profile_server

    if draft is not None or to is not None or given.keys() - {"rows"}:
        raise UserError(
            "a server's API shows neither the draft nor passes over several tokens of a row",
            next_step="leave out DRAFT, --widths, --contexts and --to, or --server to measure this machine",
        )
    return profile_server(url, rows=given.get("rows", ROWS))


def _write_sps(costs: StepCosts, out: Path) -> None:
    from deepspec.files import write_json
    from deepspec.schedule.sglang import sps_tables

    context = int(costs.contexts[len(costs.contexts) // 2])
    for form, table in sps_tables(costs, context).items():
        path = out.with_name(f"{out.stem}.sglang-{form}.json")
        write_json(path, table)
        note(
            f"sglang, {form} form, at {context} tokens of context: --speculative-dspark-sps-table-path {path}"
        )


def _print(costs: StepCosts) -> None:
    console = stdout()
    for i, context in enumerate(costs.contexts.tolist()):
        heads = [f"{width} token" + "s" * (width > 1) for width in costs.widths.tolist()]
        table = table_of("rows", *heads, "propose", "rest", "one more token")
        for a, rows in enumerate(costs.rows.tolist()):
            line = costs.target[a, :, i] * 1e3
            widest = max(int(costs.widths[-1]) - 1, 1)
            more = f"{(line[-1] - line[0]) / (rows * widest):.2f}" if len(line) > 1 else "–"
            propose = "–" if costs.propose is None else f"{costs.propose[a, i] * 1e3:.1f}"
            table.add_row(str(rows), *(f"{x:.1f}" for x in line), propose, f"{costs.rest[a] * 1e3:.1f}", more)
        table.title = f"ms per round, {context} tokens of context per row"
        table.title_justify = "left"
        console.print(table)
    prefill = ", ".join(
        f"{length}: {seconds * 1e3:.1f}"
        for length, seconds in zip(costs.prefill_lengths.tolist(), costs.prefill.tolist(), strict=True)
    )
    console.print(f"ms to the first token, by length of the prompt: {prefill}")
    for sentence in costs.notes:
        note(f"note: {sentence}")
