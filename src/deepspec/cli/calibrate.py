"""`deepspec calibrate`: how sure a draft is next to how often it is right, and temperatures that mend it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from deepspec.cli.common import (
    CALIBRATION,
    DraftName,
    Dtype,
    Json,
    MaxNew,
    Seed,
    TargetName,
    Thinking,
    load_target,
    print_json,
    prompt_file,
    sampling_of,
    stdout,
    table_of,
)
from deepspec.errors import UserError
from deepspec.files import check_writable
from deepspec.log import note
from deepspec.pocket import DRAFTS

Server = StrEnum("Server", ["sglang"])


def calibrate(
    draft: DraftName,
    target: TargetName = "pocket",
    prompts: Annotated[
        str | None, typer.Option(help="A JSONL file that the draft was not trained on.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="Number of prompts, domains in turns. 0: all.")] = 0,
    temperature: Annotated[
        float, typer.Option(min=0, help="Of the target and the draft; 0 is greedy.")
    ] = 1.0,
    max_new_tokens: MaxNew = 128,
    thinking: Thinking = False,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 8,
    dtype: Annotated[Dtype, typer.Option()] = Dtype.auto,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    out: Annotated[
        Path | None, typer.Option(help=f"The report; {CALIBRATION} in the draft's own folder.")
    ] = None,
    traces: Annotated[
        Path | None,
        typer.Option(help="Make a round at every position, and write what it tells for `deepspec simulate`."),
    ] = None,
    to: Annotated[
        Server | None, typer.Option(help="Also write the temperatures as this server reads them.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure whether a draft is as sure as it should be.

    The command compares the draft's confidence with what is accepted, and fits temperatures that make the two
    agree. The confidence is that of the draft's head or, without one, the log-odds of its likeliest token.
    Errors after scaling come from temperatures that were fitted without the domain in question. After Ctrl-C
    or a kill the same command continues.

    \b
    Example:
      deepspec calibrate pocket-dspark --out calibration.json
    """
    source = prompt_file(prompts, target)
    sampling = sampling_of(temperature)
    from deepspec.checkpoints.draft import check_draft, load_draft
    from deepspec.checkpoints.read import find_checkpoint
    from deepspec.files import write_json
    from deepspec.measure.calibrate import calibrate as measured
    from deepspec.measure.calibrate import sglang_table
    from deepspec.measure.evaluate import load_prompts
    from deepspec.targets import TargetSpec

    folder = find_checkpoint(draft)
    if out is None and (draft in DRAFTS or not Path(draft).exists()):
        raise UserError(
            f"{draft} is not in a folder of yours, so its calibration needs a place",
            next_step=f"add --out {CALIBRATION}",
        )
    path = out or folder / CALIBRATION
    check_writable(path)
    check_writable(traces)
    spec = TargetSpec.from_pretrained(target)
    if not check_draft(draft, spec).confidence and to is not None:
        raise UserError(
            f"{draft} has no confidence head, whose temperatures {to.value} would read",
            next_step=f"leave out --to {to.value}, or calibrate a DSpark draft",
        )
    tasks = load_prompts(source, spec, thinking=thinking, limit=limit)
    model = load_target(target, dtype.value, device)
    report = measured(
        model,
        load_draft(draft, model),
        tasks,
        sampling,
        thinking=thinking,
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch=batch,
        out=path,
        traces=traces,
    )
    if traces is not None:
        note(f"traces: {traces}")
    note(f"calibration: {path}")
    if to is not None:
        table = path.with_name(f"{path.stem}.{to.value}.json")
        write_json(table, sglang_table(report, source.name))
        note(f"{to.value}: --speculative-dspark-confidence-sts-path {table}")
    print_json(report) if as_json else _print(report)


def _print(report: dict[str, Any]) -> None:
    from deepspec.measure.calibrate import interval

    console = stdout()
    table = table_of("position", "temperature", "reached", "accepted", "error", "scaled", "Brier", "AUC")
    for row, temperature in zip(report["positions"], report["temperatures"], strict=True):
        accepted, area = row["accepted"], row["auc"]
        table.add_row(
            str(row["position"]),
            f"{temperature:.2f}",
            f"{row['reached']:,}",
            "–" if accepted is None else f"{accepted:.1%}",
            f"{row['ece']['before']:.1%}",
            f"{row['ece']['after']:.1%}",
            f"{row['brier']['after']:.3f}",
            "–" if area is None else f"{area:.3f}",
        )
    console.print(table)
    parts = table_of("held out", "rounds", "error", "scaled", "by chance")
    for name, row in (report["held_out"] | report["depth"] | {"all": report["overall"]}).items():
        figures = (interval(row["before"]), interval(row["after"]))
        parts.add_row(Text(name), f"{row['rounds']:,}", *figures, f"{row['noise']:.1%}")
    parts.caption = Text(
        "error: the mean distance between how likely the draft says that all tokens up to a position are "
        "accepted and how often they are (ECE); scaled: after the temperatures, fitted without that part; "
        "by chance: the error that so few rounds show even of a perfectly calibrated draft"
    )
    parts.caption_justify = "left"
    console.print(parts)
