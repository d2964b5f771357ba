"""Messages on the console, progress bars, experiment trackers.

Messages go to standard error, so that what a command prints on standard output can be piped. Only this room
imports trackers, and only when one is opened.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event, Thread
from types import ModuleType
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from deepspec.errors import UserError, without_logins

console = Console(stderr=True, highlight=False)

LINE_EVERY = 60.0
"""Seconds between the lines that take a progress bar's place if nobody watches."""

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio", "none"]


def note(text: str, *, style: str = "") -> None:
    """Print one line as it is, but for passwords in addresses: brackets are not markup, and long paths do not
    wrap."""
    console.print(Text(without_logins(text), style=style), soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning: something is not as it was asked for, and the run continues."""
    note(f"warning: {text}", style="yellow")


def show_error(error: UserError) -> None:
    """Print the three parts of a user's error; the first line stands out."""
    what, *rest = str(error).split("\n")
    note(f"error: {what}", style="bold red")
    for line in rest:
        note(line)


def shown(value: object) -> str:
    """A field's value as short text: four significant digits for a float, no decimals from 100 on."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 100 else f"{value:.4g}"


class Bar:
    """One progress bar, as handed out by `progress`. Fields keep their last value until updated."""

    def __init__(self, display: Progress, task: TaskID, count: bool) -> None:
        self._display = display
        self._task = task
        self._count = count
        self._fields: dict[str, object] = {}
        self._last = (0.0, 0.0)

    def update(self, advance: float = 1, *, completed: float | None = None, **fields: object) -> None:
        """Advance by `advance`, or to `completed` if it is given, and set fields to show next to the bar.

        A field's name may be any text: `bar.update(loss=2.1, **{"tokens/s": 1800.0})`.
        """
        self._fields.update(fields)
        text = "  ".join(f"{name} {shown(value)}" for name, value in self._fields.items())
        step = advance if completed is None else None
        self._display.update(self._task, advance=step, completed=completed, fields_text=text)

    def line(self) -> str:
        """How far it is, as text: "training: 12/400, 3%, loss 2.1, 5 min passed, about 160 min left"."""
        task = self._display.tasks[self._task]
        spent, done, total = task.elapsed or 0.0, task.completed, task.total
        words = [f"{done:,.0f}" + (f"/{total:,.0f}" if total else "")] if self._count else []
        words += [f"{done / total:.0%}"] if total else []
        words += [f"{name} {shown(value)}" for name, value in self._fields.items()]
        words.append(f"{spent / 60:.0f} min passed")
        if total and done > self._last[1]:
            left = (total - done) / (done - self._last[1]) * (spent - self._last[0])
            words.append(f"about {left / 60:.0f} min left")
        self._last = (spent, done)
        return f"{task.description}: {', '.join(words)}"


@contextmanager
def progress(description: str, total: float | None, *, count: bool = True) -> Iterator[Bar]:
    """A bar with time left and text fields. It is drawn only on a terminal that can draw; otherwise a line
    tells every minute how far it is, so that the log of a job shows that it runs.

    total: in any unit (steps, prompts, seconds of a time budget); None if the end is not known. count: show
    "12/400" next to the bar, which makes sense for things that one counts.
    """
    columns = [
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        *([MofNCompleteColumn()] if count else []),
        TextColumn("{task.fields[fields_text]}", markup=False, style="cyan"),
        TimeRemainingColumn(elapsed_when_finished=True),
    ]
    # FORCE_COLOR makes a file a terminal for rich, and TERM=dumb is one on which it draws nothing.
    watched = console.is_interactive and console.file.isatty()
    with Progress(*columns, console=console, disable=not watched) as display, ExitStack() as stack:
        bar = Bar(display, display.add_task(description, total=total, fields_text=""), count)
        if not watched:
            ended = Event()
            teller = Thread(target=_tell, args=(bar, ended), daemon=True)
            teller.start()
            stack.callback(teller.join)
            stack.callback(ended.set)
        yield bar


def _tell(bar: Bar, ended: Event) -> None:
    # A thread: a step may take longer than a line may be late.
    while not ended.wait(LINE_EVERY):
        note(bar.line())


class Tracker(NamedTuple):
    """Where the figures of a run go."""

    log: Callable[[Mapping[str, float], int], None]  # (name -> value, step)
    close: Callable[[], None]


_MODULES: dict[TrackerName, tuple[str, str | None]] = {
    "tensorboard": ("torch.utils.tensorboard", None),
    "wandb": ("wandb", "trackers"),
    "mlflow": ("mlflow", "trackers"),
    "trackio": ("trackio", "trackers"),
}
"""Each tracker's module, and the extra of this package that installs it."""


def import_tracker(package: TrackerName) -> ModuleType:
    """Import a tracker's module. Raises UserError with the command that installs it."""
    module, extra = _MODULES[package]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        wanted = f"deepspec[{extra}]" if extra else package
        raise UserError(
            f"the tracker {package!r} is not installed ({error})",
            where="recipe key `trackers`",
            next_step=f"pip install '{wanted}', or leave {package!r} out of `trackers`",
        ) from error


def open_tensorboard(directory: Path, run: str, settings: Mapping[str, Any]) -> Tracker:
    writer = import_tracker("tensorboard").SummaryWriter(log_dir=str(directory / "tensorboard"))
    writer.add_text("recipe", "```json\n" + json.dumps(settings, indent=1, default=str) + "\n```")

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def open_wandb(directory: Path, run: str, settings: Mapping[str, Any]) -> Tracker:
    handle = import_tracker("wandb").init(
        project="deepspec", name=run, dir=str(directory), config=dict(settings)
    )
    return Tracker(lambda values, step: handle.log(dict(values), step=step), handle.finish)


def open_mlflow(directory: Path, run: str, settings: Mapping[str, Any]) -> Tracker:
    mlflow = import_tracker("mlflow")
    mlflow.set_experiment("deepspec")
    mlflow.start_run(run_name=run)
    mlflow.log_params(flatten(settings))
    return Tracker(lambda values, step: mlflow.log_metrics(dict(values), step=step), mlflow.end_run)


def open_trackio(directory: Path, run: str, settings: Mapping[str, Any]) -> Tracker:
    trackio = import_tracker("trackio")
    trackio.init(project="deepspec", name=run, config=dict(settings))
    return Tracker(lambda values, step: trackio.log(dict(values), step=step), trackio.finish)


TRACKERS: dict[TrackerName, Callable[[Path, str, Mapping[str, Any]], Tracker]] = {
    "tensorboard": open_tensorboard,
    "wandb": open_wandb,
    "mlflow": open_mlflow,
    "trackio": open_trackio,
}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def open_trackers(
    names: Sequence[TrackerName], directory: Path, run: str, settings: Mapping[str, Any]
) -> Tracker:
    """Open every named tracker and return one that writes to all of them.

    directory: for the trackers' own files. run: its name. settings: its recipe as plain data. Raises
    UserError for a tracker that is not installed, after closing those that were opened before it.
    """
    opened: list[Tracker] = []

    def log(values: Mapping[str, float], step: int) -> None:
        for tracker in opened:
            tracker.log(values, step)

    with ExitStack() as stack:
        for name in names:
            if name != "none":
                opened.append(TRACKERS[name](directory, run, settings))
                stack.callback(opened[-1].close)
        return Tracker(log, stack.pop_all().close)
