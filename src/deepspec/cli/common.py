"""What the commands share: options, loading with clear errors, and printing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepspec.errors import UserError, first_line
from deepspec.log import note

if TYPE_CHECKING:
    from deepspec.data.skipping import Skipped
    from deepspec.drafts.base import NeuralDraft
    from deepspec.maths.verify import Sampling
    from deepspec.schedule.policies import Scheduled
    from deepspec.targets import Target

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
"""Exit codes: a bug or a failure of the machine, bad input, Ctrl-C. 0 means success."""
SETTINGS: dict[str, Any] = {
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "add_completion": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}

CALIBRATION = "calibration.json"
"""The report of `deepspec calibrate` in a draft's folder."""

DraftName = Annotated[
    str, typer.Argument(metavar="DRAFT", help="A built-in name, checkpoint or run folder, or a Hub id.")
]
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or the path of a .yaml file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings to change in the recipe, such as optim.lr=1e-3."),
]
TargetName = Annotated[str, typer.Option(help="The model: pocket, a directory, a GGUF file, or a Hub id.")]
Thinking = Annotated[bool, typer.Option("--thinking", help="Turn on the target's thinking mode.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample from the K likeliest tokens only; 0: from all.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total probability.")]
MaxNew = Annotated[int, typer.Option(min=1, help="Most new tokens per prompt.")]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out rows that cannot be used, and count them.")
]
Limit = Annotated[int, typer.Option(min=0, help="Read only the first N rows; 0: all.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all random numbers.")]
Json = Annotated[bool, typer.Option("--json", help="Print only JSON on standard output.")]
DropRepeats = Annotated[bool, typer.Option("--drop-repeats", help="Keep only the first row of each prompt.")]


PolicyName = Annotated[
    str,
    typer.Option(help="Proposals verified: all, none, fixed:K, threshold:C, early-stop, budget or auto."),
]
Costs = Annotated[
    Path | None,
    typer.Option(
        exists=True, dir_okay=False, help="Step costs of `deepspec profile`, for early-stop, budget and auto."
    ),
]
Calibration = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help=f"Temperatures of the confidences; {CALIBRATION} in the draft's folder, if it is there.",
    ),
]

Dtype = StrEnum("Dtype", ["auto", "float32", "bfloat16", "float16"])
TargetDtype = Annotated[Dtype, typer.Option(help="Number format of the target; auto: as stored.")]


def data_file(name: str) -> Path:
    """The file that an option names: a path, or a packaged set such as pocket:train. Raises UserError."""
    from deepspec.pocket import PROMPTS, prompts_path

    path = prompts_path(name)
    if not path.is_file():
        raise UserError(
            "it is a folder, not a file" if path.is_dir() else "there is no such file",
            where=name,
            next_step=f"give the path of a JSONL file, or one of {', '.join(PROMPTS)}",
        )
    return path


Answers = Annotated[
    Path | None,
    typer.Option(
        parser=data_file, metavar="FILE", help="Use this file of answers, not the recipe's data.train."
    ),
]


def load_target(name: str, dtype: str = "auto", device: str = "auto") -> Target:
    import torch

    from deepspec.targets import Target

    if device != "auto":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"device {device!r} cannot be used here: {first_line(error)}",
                next_step="leave --device out, or use --device cpu",
            ) from error
    return Target.from_pretrained(name, dtype, device)


def check_policy(name: str, costs: Path | None) -> None:
    """Refuse a policy that does not exist, or lacks its step costs, before anything is loaded."""
    from deepspec.schedule.named import COSTLY, policy_of

    if name not in COSTLY or costs is None:
        try:
            policy_of(name)
        except ValueError as error:
            raise UserError(str(error)) from error


def scheduled(
    name: str, costs: Path | None, calibration: Path | None, folder: Path, target: Target, draft: NeuralDraft
) -> Scheduled:
    """The policy of this name for a loaded target and draft, with the temperatures of its confidences.

    costs: a table of this machine, target and draft. calibration: a report, or the one in the draft's
    folder. Raises UserError for files that belong to something else.
    """
    from deepspec.measure.calibrate import temperatures_of
    from deepspec.measure.evaluate import fingerprint
    from deepspec.schedule.costs import read_costs
    from deepspec.schedule.named import COSTLY, policy_of
    from deepspec.schedule.policies import Scheduled
    from deepspec.this_machine import this_machine

    check_policy(name, costs)
    table = None
    if costs is not None and name in COSTLY:
        machine, of = this_machine(), target.spec.config_hash
        table = read_costs(costs, target=of, draft=fingerprint(draft), machine=machine)
    policy, file = policy_of(name, table, draft.max_proposals), calibration or folder / CALIBRATION
    if not (name in COSTLY or name.startswith("threshold:")) or not file.exists():
        return Scheduled(policy, None)
    note(f"confidences are scaled by the temperatures of {file}")
    return Scheduled(policy, temperatures_of(file, draft))


def sampling_of(temperature: float, top_k: int = 0, top_p: float = 1.0) -> Sampling:
    from deepspec.maths.verify import Sampling

    try:
        return Sampling(temperature, top_k, top_p)
    except ValueError as error:
        raise UserError(str(error)) from error


def numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """The whole numbers, rising, of an option such as 1,2,4; None if it is not given. Raises UserError."""
    if text is None:
        return None
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or found[0] < 1 or list(found) != sorted(set(found)):
        raise UserError(f"{option} {text} is not a rising list of whole numbers", next_step="write 1,2,4")
    return found


def prompt_file(name: str | None, target: str) -> Path:
    """The file of prompts with this name. None is pocket:test, for the pocket target only."""
    from deepspec.pocket import prompts_path

    if name is None and target != "pocket":
        raise UserError(
            f"{target} needs prompts to be evaluated on",
            next_step="add --prompts FILE.jsonl with one conversation per line, or --prompts pocket:test",
        )
    return prompts_path(name or "pocket:test")


def skipping(skip_bad: bool) -> Skipped:
    """What becomes of bad rows: they are counted, or refused with a message that names --skip-bad."""
    from deepspec.data.skipping import SkipNothing, Skipped

    return Skipped() if skip_bad else SkipNothing()


def report_skipped(skipped: Skipped) -> None:
    for line in skipped.lines():
        note(line, style="yellow" if not line.startswith(" ") else "")


def stdout() -> Console:
    return Console(highlight=False)


def print_json(value: Any) -> None:
    from deepspec.files import plain

    typer.echo(json.dumps(plain(value), ensure_ascii=False, indent=1))


def print_results(results: Sequence[dict[str, Any]]) -> None:
    from deepspec.report.page import results_table

    stdout().print(results_table(results))


def table_of(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if i else "left", overflow="fold")
    return table


def say_repeats(repeats: int, dropped: bool) -> None:
    fate = "dropped" if dropped else "kept, each under an id of its own"
    typer.echo(f"rows that repeat an earlier prompt: {repeats:,}" + (f" ({fate})" if repeats else ""))
