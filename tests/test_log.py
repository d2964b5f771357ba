from __future__ import annotations

import io
import json
import re
import sys
import time
import types

import pytest
from rich.console import Console

from deepspec import log
from deepspec.errors import UserError
from deepspec.log import TRACKERS, TrackerName, flatten, open_trackers, progress, shown


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# ---- console and progress


def test_brackets_in_an_error_are_not_taken_for_markup(capsys):
    log.show_error(UserError("`ids` must be list[int]", where="/a/[red]/b.yaml"))
    printed = capsys.readouterr()
    assert printed.err == "error: `ids` must be list[int]\n  where: /a/[red]/b.yaml\n"
    assert printed.out == ""  # standard output is for results


def test_long_paths_are_not_broken_across_lines(capsys):
    path = "/a" * 200
    log.note(path)
    assert capsys.readouterr().err == path + "\n"


def test_no_bar_is_drawn_when_nobody_watches(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(log, "console", Console(file=screen, force_terminal=False))
    with progress("training", 3) as bar:
        for _ in range(3):
            bar.update(loss=1.0)
    assert screen.getvalue() == ""


def test_a_job_without_a_terminal_gets_plain_lines_even_while_a_step_lasts(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(log, "console", Console(file=screen, force_terminal=False))
    monkeypatch.setattr(log, "LINE_EVERY", 0.02)
    with progress("training [tiny]", 400) as bar:
        bar.update(12, loss=2.125, **{"tokens/s": 1800.0})
        time.sleep(0.15)  # one step: nothing is updated
    told = screen.getvalue().splitlines()
    said = "training [tiny]: 12/400, 3%, loss 2.125, tokens/s 1,800, 0 min passed"
    assert told[0] == f"{said}, about 0 min left"
    assert told[1] == said and len(told) >= 3
    time.sleep(0.05)
    assert screen.getvalue().splitlines() == told  # the lines end with the step


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        (None, True, "reading rows: 30, 2 min passed"),
        (120.0, False, "reading rows: 25%, 2 min passed, about 6 min left"),
        (120.0, True, "reading rows: 30/120, 25%, 2 min passed, about 6 min left"),
    ],
)
def test_a_plain_line_says_how_far_and_how_long(monkeypatch, total, count, expected):
    screen = io.StringIO()
    monkeypatch.setattr(log, "console", Console(file=screen, force_terminal=False))
    with progress("reading rows", total, count=count) as bar:
        bar.update(30)
        task = bar._display.tasks[0]
        task.start_time = task.get_time() - 120
        assert bar.line() == expected
    assert screen.getvalue() == ""


class Screen(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("file", "variables"),
    [(io.StringIO, {"FORCE_COLOR": "1"}), (io.StringIO, {"TTY_COMPATIBLE": "1"}), (Screen, {"TERM": "dumb"})],
)
def test_what_is_only_called_a_terminal_gets_plain_lines(monkeypatch, file, variables):
    """Schedulers and CI set FORCE_COLOR for files, and a dumb terminal shows no bar."""
    screen = file()
    monkeypatch.setattr(log, "console", Console(file=screen, _environ=variables))
    monkeypatch.setattr(log, "LINE_EVERY", 0.01)
    with progress("training", 400) as bar:
        bar.update(12)
        until = time.monotonic() + 10
        while "\n" not in screen.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
    assert re.match(r"training: (0/400, 0%|12/400, 3%), 0 min passed", screen.getvalue())


def terminal(monkeypatch):
    screen = Screen()
    console = Console(file=screen, width=120, color_system=None, _environ={"TERM": "xterm"})
    monkeypatch.setattr(log, "console", console)
    return screen


def last_line(screen):
    """What the bar looks like in the end, without the codes that move the cursor."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", screen.getvalue())
    return [line for line in text.splitlines() if line.strip()][-1]


def test_bar_shows_count_and_keeps_fields_that_an_update_leaves_out(monkeypatch):
    screen = terminal(monkeypatch)
    with progress("training [a]", 4) as bar:
        bar.update(loss=2.34567, tau=1.5)
        bar.update(3, **{"tokens/s": 1234.5})
    last = last_line(screen)
    assert "training [a]" in last
    assert "4/4" in last
    assert "loss 2.346  tau 1.5  tokens/s 1,234" in last


def test_bar_can_follow_a_time_budget(monkeypatch):
    screen = terminal(monkeypatch)
    with progress("training", 60.0, count=False) as bar:
        bar.update(completed=30.0, loss=1.0)
        bar.update(completed=60.0)
    last = last_line(screen)
    assert "60/60" not in last
    assert "loss 1" in last


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.34567, "2.346"), (1234.5, "1,234"), (0.0001, "0.0001"), (7, "7"), ("x", "x"), (float("nan"), "nan")],
)
def test_fields_are_short(value, text):
    assert shown(value) == text


# ---- trackers


class Recorder(types.ModuleType):
    """A module whose every function notes how it was called."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple, dict]] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call


def test_recipe_names_and_tracker_table_agree():
    assert {*TRACKERS, "none"} == set(TrackerName.__args__)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "wandb",
            [
                (
                    "init",
                    (),
                    {"project": "deepspec", "name": "r", "dir": "D", "config": {"optim": {"lr": 1.0}}},
                ),
                ("log", ({"loss": 2.0},), {"step": 7}),
                ("finish", (), {}),
            ],
        ),
        (
            "mlflow",
            [
                ("set_experiment", ("deepspec",), {}),
                ("start_run", (), {"run_name": "r"}),
                ("log_params", ({"optim.lr": 1.0},), {}),
                ("log_metrics", ({"loss": 2.0},), {"step": 7}),
                ("end_run", (), {}),
            ],
        ),
        (
            "trackio",
            [
                ("init", (), {"project": "deepspec", "name": "r", "config": {"optim": {"lr": 1.0}}}),
                ("log", ({"loss": 2.0},), {"step": 7}),
                ("finish", (), {}),
            ],
        ),
    ],
)
def test_each_tracker_gets_run_settings_figures_and_its_end(monkeypatch, tmp_path, name, expected):
    module = Recorder(name)
    monkeypatch.setitem(sys.modules, name, module)
    tracker = open_trackers([name], tmp_path, "r", {"optim": {"lr": 1.0}})
    tracker.log({"loss": 2.0}, 7)
    tracker.close()
    calls = [(f, a, k | {"dir": "D"} if "dir" in k else k) for f, a, k in module.calls]
    assert calls == expected


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_missing_tracker_names_the_command_that_installs_it(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)  # makes the import fail, installed or not
    with pytest.raises(UserError) as caught:
        open_trackers([name], tmp_path, "r", {})
    assert "pip install 'deepspec[trackers]'" in str(caught.value)
    assert repr(name) in str(caught.value)


def test_a_tracker_that_fails_to_open_closes_those_before_it(monkeypatch, tmp_path):
    module = Recorder("trackio")
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError):
        open_trackers(["trackio", "wandb"], tmp_path, "r", {})
    assert [name for name, _, _ in module.calls] == ["init", "finish"]


def test_no_tracker_is_fine(tmp_path):
    tracker = open_trackers(["none"], tmp_path, "r", {})
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_writes_the_figures_it_is_given(tmp_path):
    tracker = open_trackers(["tensorboard"], tmp_path, "r", {"optim": {"lr": 1.0}})
    tracker.log({"loss": 2.5, "held_out_tau": 1.75}, 7)
    tracker.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(7, 2.5)]
    assert [(e.step, e.value) for e in events.Scalars("held_out_tau")] == [(7, 1.75)]


def test_flatten_joins_keys_with_dots():
    assert flatten({"a": {"b": {"c": 1}, "d": [2]}, "e": None}) == {"a.b.c": 1, "a.d": [2], "e": None}
