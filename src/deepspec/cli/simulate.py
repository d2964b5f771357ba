"""`deepspec simulate`: what each policy gives under a load, from step costs and traces."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from deepspec.cli.common import Json, Seed, numbers, print_json, stdout, table_of
from deepspec.errors import UserError
from deepspec.files import check_writable
from deepspec.log import note

if TYPE_CHECKING:
    from deepspec.schedule.costs import StepCosts
    from deepspec.schedule.simulate import Arrivals, Outcome
    from deepspec.schedule.traces import Traces


def simulate(
    costs: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="Step costs of `deepspec profile`.")
    ],
    traces: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="Traces of `deepspec calibrate --traces`.")
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="May be repeated: none, fixed:K, threshold:C, early-stop, budget, auto; trim:POLICY (it "
            "verifies everything and cuts afterwards), oracle (it knows what will be accepted)."
        ),
    ] = None,
    users: Annotated[
        str, typer.Option(help="Closed loops: each of so many users has one request in flight.")
    ] = "1,4,16,64",
    rate: Annotated[
        list[float] | None,
        typer.Option(min=0.001, help="Requests per second that come by themselves; may be repeated."),
    ] = None,
    bursty: Annotated[
        bool, typer.Option("--bursty", help="They come in bursts, at the same mean rate.")
    ] = False,
    slots: Annotated[int, typer.Option(min=1, help="The most requests in flight.")] = 64,
    requests: Annotated[int, typer.Option(min=20, help="Requests to serve at each load.")] = 400,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of the prompts; that of the traces, if not given.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Temperatures of the confidences.")
    ] = None,
    elsewhere: Annotated[
        bool, typer.Option("--elsewhere", help="Take step costs that another machine measured.")
    ] = False,
    seed: Seed = 0,
    plot: Annotated[Path | None, typer.Option(help="Also draw the throughputs, as an .svg file.")] = None,
    as_json: Json = False,
) -> None:
    """Replay policies under a load, on recorded traces.

    Nothing is decoded: what would be accepted comes from the traces, what a round takes from the step costs,
    both of the same target and draft. A policy serves the loads one after another, and keeps what it learns.
    --rate replaces --users.

    \b
    Example:
      deepspec simulate --costs costs.json --traces traces.json --users 1,8,32
    """
    check_writable(plot)
    from deepspec.report.charts import write_lines
    from deepspec.schedule.simulate import Simulator, simulated

    table, recorded = _read(costs, traces, calibration, elsewhere)
    if prompt_tokens is not None:
        recorded = recorded.with_prompts(prompt_tokens)
    if recorded.longest > table.contexts[-1]:
        note(
            f"requests of up to {recorded.longest} tokens are longer than the {table.contexts[-1]} of the "
            "step costs, which are extrapolated",
            style="yellow",
        )
    loads, names = _loads(users, rate, bursty), policy or usual(recorded.block)
    try:
        policies = {name: simulated(name, table, recorded.block) for name in names}
    except ValueError as error:
        raise UserError(str(error)) from error
    simulator = Simulator(table, recorded, slots, seed)
    found = {
        label: {name: simulator.serve(each, load, requests) for name, each in policies.items()}
        for label, load in loads.items()
    }
    if plot is not None:
        lines = {name: [each[name].tokens_per_s for each in found.values()] for name in names}
        write_lines(plot, "Throughput", "rate" if rate else "users", "tokens/s", list(found), lines)
        note(f"plot: {plot}")
    if as_json:
        print_json({label: {n: asdict(o) for n, o in each.items()} for label, each in found.items()})
        return
    for label, each in found.items():
        _print(f"{label} requests/s" if rate else f"{label} users", each)


def usual(block: int) -> list[str]:
    """Every kind of policy, and every fixed length."""
    fixed = [f"fixed:{k}" for k in range(1, block + 1)]
    return ["none", *fixed, "threshold:0.5", "trim:threshold:0.5", "early-stop", "budget", "auto", "oracle"]


def _read(costs: Path, traces: Path, calibration: Path | None, elsewhere: bool) -> tuple[StepCosts, Traces]:
    """The step costs, and the traces of the same target and draft."""
    from deepspec.schedule.costs import read_costs
    from deepspec.schedule.traces import read_traces
    from deepspec.this_machine import this_machine

    table = read_costs(costs, machine=None if elsewhere else this_machine())
    of = table.identity
    if of.draft_hash is None:
        raise UserError(
            "these step costs are of a target alone",
            where=str(costs),
            next_step="profile the draft with it: deepspec profile DRAFT --target TARGET",
        )
    recorded = read_traces(traces, draft=of.draft_hash, target=of.target_hash)
    if calibration is not None:
        from deepspec.measure.calibrate import temperatures_for

        name = of.draft or "the draft"
        recorded = recorded.scaled(temperatures_for(calibration, of.draft_hash, recorded.block, name))
    return table, recorded


def _loads(users: str, rate: list[float] | None, bursty: bool) -> dict[str, Arrivals]:
    from deepspec.schedule.simulate import Arrivals

    if rate:
        return {f"{each:g}": Arrivals(rate=each, bursty=bursty) for each in rate}
    if bursty:
        raise UserError("users that wait for their answers send no bursts", next_step="give --rate, too")
    return {str(count): Arrivals(users=count) for count in numbers(users, "--users") or ()}


def _print(load: str, found: dict[str, Outcome]) -> None:
    table = table_of(
        "policy",
        "tok/s",
        "× best fixed",
        "tok/s per user",
        "first token s",
        "answer s",
        "verified",
        "per round",
    )
    fixed = [o.tokens_per_s for name, o in found.items() if name == "none" or name.startswith("fixed:")]
    for name, o in found.items():
        first, answer = (f"{median:.2f} ({late:.2f})" for median, late in (o.first_s, o.answer_s))
        table.add_row(
            Text(f"{name}, too slow" if o.too_much else name),
            f"{o.tokens_per_s:.0f}",
            f"{o.tokens_per_s / max(fixed):.3f}" if fixed else "–",
            f"{o.per_user:.1f}",
            first,
            answer,
            f"{o.verified:.2f}",
            f"{o.kept:.2f}",
        )
    table.title, table.title_justify = Text(load), "left"
    table.caption = Text(
        "seconds: median (95th percentile); verified: proposals per row and round; per round: tokens per row"
    )
    table.caption_justify = "left"
    stdout().print(table)
