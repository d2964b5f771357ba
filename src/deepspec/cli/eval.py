"""`deepspec eval`: drafts measured against plain decoding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from deepspec.cli.common import (
    Calibration,
    Costs,
    Device,
    Dtype,
    Json,
    MaxNew,
    PolicyName,
    Seed,
    SkipBad,
    TargetDtype,
    TargetName,
    Thinking,
    TopK,
    TopP,
    check_policy,
    load_target,
    print_json,
    print_results,
    prompt_file,
    report_skipped,
    sampling_of,
    scheduled,
    skipping,
)
from deepspec.errors import UserError
from deepspec.files import check_writable
from deepspec.log import note, warn
from deepspec.pocket import DRAFTS


def evaluate(
    target: TargetName = "pocket",
    draft: Annotated[
        list[str] | None,
        typer.Option(help="A built-in name, checkpoint or run folder, or a Hub id; may be repeated."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="A JSONL file, or pocket:test (the default for pocket).")
    ] = None,
    limit: Annotated[
        int, typer.Option(min=0, help="Number of prompts, taken from the domains in turns; 0: all.")
    ] = 12,
    temperature: Annotated[
        list[float] | None, typer.Option(min=0, help="0 is greedy; may be repeated.")
    ] = None,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNew = 96,
    thinking: Thinking = False,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Generate the whole budget, past stop tokens.")
    ] = False,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 1,
    dtype: TargetDtype = Dtype.auto,
    device: Device = "auto",
    no_baselines: Annotated[
        bool, typer.Option("--no-baselines", help="Leave out transformers' generate and prompt lookup.")
    ] = False,
    policy: PolicyName = "all",
    costs: Costs = None,
    calibration: Calibration = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Results file; several temperatures add -t<temperature> to its name."),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML report.")] = None,
    skip_bad: SkipBad = False,
    as_json: Json = False,
) -> None:
    """Measure how much faster a target is with drafts.

    All methods answer the same prompts in turns: plain decoding, transformers' generate, prompt lookup, and
    the drafts. The table has accepted length, speed, and whether the output changed. With --out every
    measured prompt is kept, so that the same command continues after Ctrl-C or a kill.

    \b
    Example:
      deepspec eval --target pocket --draft pocket-dspark --temperature 0 --temperature 1
    """
    check_policy(policy, costs)
    source = prompt_file(prompts, target)
    names = draft or []
    if not names:
        raise UserError(
            "no draft to evaluate",
            next_step=f"add --draft NAME: a run or checkpoint folder, or one of {', '.join(DRAFTS)}",
        )
    samplings = [sampling_of(t, top_k, top_p) for t in temperature or [0.0]]
    check_writable(out)
    check_writable(report)
    from deepspec.checkpoints.draft import check_draft, load_draft
    from deepspec.checkpoints.read import find_checkpoint, load_provenance
    from deepspec.conditions import Conditions, differences
    from deepspec.measure.evaluate import conditions_of, evaluate_at, load_prompts
    from deepspec.report.page import write_report
    from deepspec.report.results import read_metrics
    from deepspec.targets import TargetSpec

    folders = dict(zip(draft_labels(names), names, strict=True))
    # What can be refused is refused before the weights are loaded.
    for name in names:
        find_checkpoint(name)
    spec = TargetSpec.from_pretrained(target)
    for name in names:
        check_draft(name, spec)
    skipped = skipping(skip_bad)
    tasks = load_prompts(source, spec, thinking=thinking, limit=limit, skipped=skipped)
    report_skipped(skipped)
    curves = {label: read_metrics(Path(name) / "metrics.jsonl") for label, name in folders.items()}
    model = load_target(target, dtype.value, device)
    drafts = {label: load_draft(name, model) for label, name in folders.items()}
    how = {
        label: scheduled(policy, costs, calibration, find_checkpoint(folders[label]), model, loaded)
        for label, loaded in drafts.items()
    }
    now = conditions_of(model, tasks, thinking)
    for label, name in folders.items():
        trained = Conditions.read(load_provenance(find_checkpoint(name)))
        for sentence in differences(f"{label} was trained", trained, "is measured", now):
            warn(sentence)
    results = evaluate_at(
        model,
        drafts,
        tasks,
        samplings,
        thinking=thinking,
        max_new_tokens=max_new_tokens,
        seed=seed,
        ignore_eos=ignore_eos,
        batch=batch,
        baselines=not no_baselines,
        policy=policy,
        scheduled=how,
        out=out,
    )
    if report is not None:
        shown = {label: rows for label, rows in curves.items() if rows}
        note(f"report: {write_report(report, results, shown)}")
    if as_json:
        print_json(results if len(results) > 1 else results[0])
    else:
        print_results(results)


def draft_labels(names: Sequence[str]) -> list[str]:
    """The drafts' names in tables: that of the run or the folder, in full if two would be alike."""
    paths = [Path(name) for name in names]
    runs = [path.parent.parent.name if path.parent.name == "checkpoints" else "" for path in paths]
    labels = [run or path.name or name for run, path, name in zip(runs, paths, names, strict=True)]
    full = [name if labels.count(label) > 1 else label for name, label in zip(names, labels, strict=True)]
    twice = next((label for label in full if full.count(label) > 1), None)
    if twice is not None:
        raise UserError(f"the draft {twice} is given twice", next_step="name each draft once")
    return full
