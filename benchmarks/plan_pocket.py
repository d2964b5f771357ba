"""How well `deepspec plan pocket-dspark --machine here` predicts a real run: predicted and actual seconds.

    python benchmarks/plan_pocket.py                     measure, plan, run, compare; about six minutes
    python benchmarks/plan_pocket.py --write             into the table of docs/plan.md

The run answers some packaged prompts and then trains for a fixed number of steps, so that its time is a
prediction and not a budget. Measurement and run follow each other; each reports its share of a core. If
the two differ, other work on the machine came between, and the comparison says little. On a machine that is
never quiet, `--clock processor` counts seconds of processor time on both sides. The goal is 30%.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from datetime import date
from pathlib import Path

from deepspec.answers.in_process import PACKAGED_ROWS, regenerate
from deepspec.config import load_recipe
from deepspec.cost.plan import make_plan
from deepspec.cost.step_time import Measured
from deepspec.data.conversations import read_conversations
from deepspec.planning import prepare
from deepspec.pocket import prompts_path
from deepspec.targets import Target
from deepspec.train.loop import train_draft

PAGE = Path(__file__).parents[1] / "docs" / "plan.md"
BEGIN, END = "<!-- accuracy: begin -->\n", "<!-- accuracy: end -->\n"
ANSWERS = "regeneration"


def compare(folder: Path, prompts: int, steps: int) -> tuple[dict[str, tuple[float, float]], float, float]:
    """({phase: (predicted, actual) seconds}, share of a core while measuring, while running)."""
    os.environ["DEEPSPEC_CACHE"] = str(folder / "cache")
    recipe = load_recipe("pocket-dspark", ["optim.max_minutes=null", f"optim.max_steps={steps}"])
    lines = prompts_path("pocket:train").read_text("utf-8").splitlines(keepends=True)
    asked, answers = folder / "prompts.jsonl", folder / "answers.jsonl"
    asked.write_text("".join(lines[:: len(lines) // prompts][:prompts]), "utf-8")

    inputs, source = prepare(recipe, "here", again=True, data=asked, batch=PACKAGED_ROWS)
    assert isinstance(source, Measured)
    planned = {name: float(each) for name, each in make_plan(inputs, source).sections["time"].items()}

    began, worked = time.perf_counter(), time.process_time()
    rows = list(read_conversations(asked))
    regenerate(Target.from_pretrained("pocket"), rows, answers, max_rows=PACKAGED_ROWS)
    answered = time.perf_counter() - began
    train_draft(recipe, folder / "runs", answers=answers)
    ended, spent = time.perf_counter() - began, time.process_time() - worked

    predicted = planned[ANSWERS] + source.speeds.load
    rest = planned["all"] - planned[ANSWERS]
    phases = {
        "loading and answers": (predicted, answered),
        "training": (rest, ended - answered),
        "all": (predicted + rest, ended),
    }
    return phases, source.speeds.share, spent / ended


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    parser.add_argument("--write", action="store_true", help="into docs/plan.md")
    given = parser.parse_args()
    if given.clock == "processor":
        time.perf_counter = time.process_time
    with tempfile.TemporaryDirectory() as folder:
        phases, measuring, running = compare(Path(folder), given.prompts, given.steps)
    lines = ["| phase | predicted, s | actual, s | predicted / actual |", "|---|---|---|---|"]
    lines += [f"| {name} | {p:.1f} | {a:.1f} | {p / a:.2f} |" for name, (p, a) in phases.items()]
    lines += [
        "",
        f"`python benchmarks/plan_pocket.py --prompts {given.prompts} --steps {given.steps} "
        f"--clock {given.clock}`, {date.today().isoformat()}, {os.cpu_count()} cores, {given.clock} seconds"
        + ("." if given.clock == "processor" else f"; shares of a core {measuring:.2f} and {running:.2f}."),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if given.write:
        before, rest = PAGE.read_text("utf-8").split(BEGIN)
        PAGE.write_text(before + BEGIN + text + END + rest.split(END)[1], "utf-8")


if __name__ == "__main__":
    main()
