"""eval, compare, report, generate, inspect: what drafts are worth, and what they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from deepspec.cli.common import (
    Dtype,
    Json,
    MaxNew,
    Seed,
    TargetName,
    Thinking,
    TopK,
    TopP,
    check_out,
    load_target,
    print_json,
    print_results,
    prompt_file,
    sampling_of,
    stdout,
    table_of,
)
from deepspec.errors import DataError, UserError
from deepspec.log import note, warn
from deepspec.pocket import DRAFTS

if TYPE_CHECKING:
    from deepspec.decode import Generation
    from deepspec.target import Target


def evaluate(
    target: TargetName = "pocket",
    draft: Annotated[
        list[str] | None,
        typer.Option("--draft", help="Built-in name, checkpoint or run folder; may be repeated."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="JSONL file, pocket:test or pocket:select.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Prompts, domains in turns. 0: all.")] = 12,
    temperature: Annotated[
        list[float] | None, typer.Option("--temperature", min=0, help="0 is greedy; may be repeated.")
    ] = None,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNew = 96,
    thinking: Thinking = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Never stop before the budget.")] = False,
    seed: Seed = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts decoded together.")] = 1,
    dtype: Annotated[Dtype, typer.Option("--dtype")] = Dtype.auto,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, …")] = "auto",
    no_baselines: Annotated[
        bool, typer.Option("--no-baselines", help="Leave out transformers' generate and prompt lookup.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Results file; with several temperatures -t<temperature> is added."),
    ] = None,
    report: Annotated[Path | None, typer.Option("--report", help="Write an HTML report too.")] = None,
    as_json: Json = False,
) -> None:
    """Measure drafts beside plain decoding: accepted length, speed, and whether the output changed.

    With --out what is measured is kept prompt by prompt: after Ctrl-C or a kill the same command goes on.

    \b
    Example:
      deepspec eval --target pocket --draft pocket-dspark --temperature 0 --temperature 1
    """
    source = prompt_file(prompts, target)
    names = draft or []
    if not names:
        raise UserError(
            "no draft to evaluate",
            next_step=f"add --draft NAME: a run or checkpoint folder, or one of {', '.join(DRAFTS)}",
        )
    samplings = [sampling_of(t, top_k, top_p) for t in temperature or [0.0]]
    check_out(out)
    check_out(report)
    from deepspec.checkpoint import find_checkpoint, load_draft, load_provenance
    from deepspec.compare import mode_differences
    from deepspec.evaluate import evaluate_at, load_prompts, mode_of
    from deepspec.report import write_report
    from deepspec.workflow import read_metrics

    folders = {label: name for label, name in zip(draft_labels(names), names, strict=True)}
    for name in names:
        find_checkpoint(name)  # a mistyped name should not wait for the target to load
    model = load_target(target, dtype.value, device)
    drafts = {label: load_draft(name, model) for label, name in folders.items()}
    tasks = load_prompts(source, model, thinking=thinking, limit=limit)
    now = mode_of(model, tasks, thinking)
    for label, name in folders.items():
        facts = load_provenance(find_checkpoint(name))
        for sentence in mode_differences(f"{label} was trained", facts, "is measured", now):
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
        out=out,
    )
    if report is not None:
        curves = {label: rows for label, name in folders.items() if (rows := read_metrics(Path(name)))}
        note(f"report: {write_report(report, results, curves)}")
    if as_json:
        print_json(results if len(results) > 1 else results[0])
    else:
        print_results(results)


def compare(
    files: Annotated[list[Path], typer.Argument(metavar="RESULTS.json", help="Written by deepspec eval.")],
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Compare even what was measured under other conditions.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Paired differences in accepted length, with 95% intervals over prompts.

    \b
    Example:
      deepspec compare before.json after.json
    """
    from deepspec.compare import compare_results

    found = compare_results([r for file in files for r in read_results(file)], allow_mismatch)
    for sentence in [*found["refusals"], *found["warnings"]]:
        warn(sentence)
    if as_json:
        print_json(found)
        return
    table = table_of("b - a", "prompts", "τ(a)", "τ(b)", "difference", "95% interval")
    for pair in found["comparisons"]:
        table.add_row(*_difference_cells(f"{pair['b']}\n  - {pair['a']}", pair))
        for domain, part in pair["domains"].items():
            table.add_row(*_difference_cells(f"    {domain}", part))
    stdout().print(table)
    left_out = max(pair["left_out"] for pair in found["comparisons"])
    if left_out:
        warn(f"up to {left_out} prompts that only one side has were left out")


def report(
    files: Annotated[list[Path], typer.Argument(metavar="RESULTS.json", help="Written by deepspec eval.")],
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metrics", metavar="NAME=FILE", help="A draft's metrics.jsonl; may be repeated."),
    ] = None,
    out: Annotated[Path, typer.Option("--out")] = Path("report.html"),
) -> None:
    """Results files as one HTML page that opens from disk.

    \b
    Example:
      deepspec report eval-t0.json eval-t1.json --metrics dspark=runs/pocket-dspark/metrics.jsonl
    """
    check_out(out)
    results = [r for file in files for r in read_results(file)]
    training = dict(_read_curve(text) for text in metrics or [])
    from deepspec.report import write_report

    typer.echo(str(write_report(out, results, training)))


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the user says.")],
    target: TargetName = "pocket",
    draft: Annotated[str | None, typer.Option("--draft", help="Default for pocket: pocket-dspark.")] = None,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 is greedy.")] = 0.0,
    max_new_tokens: MaxNew = 128,
    thinking: Thinking = False,
    seed: Seed = 0,
    plain: Annotated[bool, typer.Option("--plain", help="Decode without a draft.")] = False,
) -> None:
    """Answer one prompt and show which tokens the draft produced.

    \b
    Example:
      deepspec generate "Ada has 12 apples. Ada buys 5 more apples. How many apples does Ada have now?"
    """
    if draft is None and target == "pocket":
        draft = "pocket-dspark"
    if draft is None and not plain:
        raise UserError(f"no draft for {target}", next_step="add --draft NAME, or --plain to decode without")
    sampling_of(temperature)
    from deepspec.checkpoint import load_draft
    from deepspec.data.tokens import prompt_ids
    from deepspec.decode import generate as decode

    model = load_target(target)
    if model.tokenizer is None:
        raise UserError(f"{target} has no tokenizer", next_step="put its tokenizer files beside its weights")
    chosen = None if plain or draft is None else load_draft(draft, model)
    ids = prompt_ids(model.tokenizer, [{"role": "user", "content": prompt}], thinking)
    answer = decode(model, chosen, ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    stdout().print(coloured(model, answer), soft_wrap=True)
    rate = f"{len(answer.token_ids)} tokens, {len(answer.token_ids) / answer.seconds:.1f} tokens/s"
    if chosen is not None and answer.kept:
        # The round past a full budget kept nothing and would only pull the figure down.
        kept = [k for k in answer.kept if k]
        note(f"{rate}, τ {sum(kept) / max(len(kept), 1):.2f} tokens per verify round")
        note(f"green: {sum(answer.from_draft)} tokens that {chosen.name} proposed and the target accepted")
    else:
        note(rate)


def inspect(
    draft: Annotated[
        str, typer.Argument(metavar="DRAFT", help="Built-in name, checkpoint or run folder; any layout.")
    ],
    target: Annotated[
        str | None,
        typer.Option("--target", help="Also say whether it fits: pocket, a directory, or a Hub id."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a draft checkpoint is, what it costs beside its target, and whether it fits one.

    Reads config files and the weights' headers: no weights are loaded.

    \b
    Example:
      deepspec inspect pocket-dspark --target pocket
    """
    from deepspec.checkpoint import find_checkpoint
    from deepspec.inspection import inspect_draft
    from deepspec.target import TargetSpec

    find_checkpoint(draft)  # a mistyped name should not wait for the Hub
    found = inspect_draft(draft, None if target is None else TargetSpec.from_pretrained(target))
    if as_json:
        print_json(found)
        return
    for name, value in found.items():
        if name not in ("reasons", "doubts"):
            shown = str(value) if name == "mask_token_id" and value is not None else _fact(value)
            stdout().print(Text(f"{name.replace('_', ' '):<36}{shown}"), soft_wrap=True)
    for sentence in found["reasons"]:
        stdout().print(Text(f"does not fit: {sentence}"), soft_wrap=True)
    for sentence in found["doubts"]:
        warn(sentence)


def _fact(value: Any) -> str:
    """A fact as people read it; "–" where there is none, or the checkpoint does not say."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────


def draft_labels(names: Sequence[str]) -> list[str]:
    """What drafts are called in tables: the run's or the folder's name, in full where two would be alike."""
    labels = []
    for name in names:
        path = Path(name)
        inside_run = path.parent.name == "checkpoints"
        labels.append(
            path.parent.parent.name if inside_run and path.parent.parent.name else path.name or name
        )
    full = [name if labels.count(label) > 1 else label for name, label in zip(names, labels, strict=True)]
    twice = next((label for label in full if full.count(label) > 1), None)
    if twice is not None:
        raise UserError(f"the draft {twice} is given twice", next_step="name each draft once")
    return full


def read_results(path: Path) -> list[dict[str, Any]]:
    """The results of a file: one object, or the array that `deepspec eval --json` prints for several
    temperatures. Raises DataError."""
    from deepspec.compare import FORMAT

    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else f"not JSON: {error}"
        raise DataError(
            f"the results cannot be read: {why}",
            where=str(path),
            next_step="give a file that `deepspec eval --out FILE.json` wrote",
        ) from error
    results = found if isinstance(found, list) else [found]
    for result in results:
        if not isinstance(result, dict) or result.get("format") != FORMAT:
            raise DataError(
                f"not a results file: no format {FORMAT!r} in it",
                where=str(path),
                next_step="give a file that `deepspec eval --out FILE.json` wrote",
            )
    return results


def _read_curve(text: str) -> tuple[str, list[dict[str, Any]]]:
    """NAME=FILE -> the name and the rows of the metrics file (a run folder will do)."""
    name, equals, where = text.partition("=")
    path = Path(where) / "metrics.jsonl" if Path(where).is_dir() else Path(where)
    if not (name and equals and path.is_file()):
        raise UserError(
            f"--metrics {text}: no such metrics file" if equals else f"--metrics {text}: no name given",
            next_step="write NAME=FILE, for example dspark=runs/pocket-dspark/metrics.jsonl",
        )
    rows = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"malformed JSON: {error}", where=f"{path}:{number}") from error
    return name, rows


# ── printing ─────────────────────────────────────────────────────────────────────────────────────────


def _difference_cells(name: str, part: Mapping[str, Any]) -> list[Text]:
    from deepspec.compare import MISSING, number

    found = part["difference"] or {}
    interval = f"{number(found.get('low'))} to {number(found.get('high'))}" if found else MISSING
    figures = [str(part["prompts"]), number(part["tau_a"]), number(part["tau_b"]), number(found.get("value"))]
    return [Text(cell) for cell in [name, *figures, interval]]


def coloured(target: Target, answer: Generation) -> Text:
    """The answer, draft-produced tokens in green."""
    from deepspec.decode import pieces_of

    text = Text()
    for piece, drafted in pieces_of(target.tokenizer, answer):
        text.append(piece, style="green" if drafted else "")
    return text
