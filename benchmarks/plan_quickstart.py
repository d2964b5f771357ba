"""How well `deepspec plan quickstart` predicts the quickstart's own phases on this machine.

    python benchmarks/plan_quickstart.py --fast          measure, plan, run, compare; about five minutes
    python benchmarks/plan_quickstart.py --write         the full form, into the table of docs/plan.md

Measurement and run follow each other and use one thread. Each says what share of a core it got: where the
two differ, other work on the machine came between, and the comparison says little. On a machine that is
never quiet, `--clock processor` has both count seconds of processor time, which the wall clock would show if
nothing else ran; the quickstart's budgets of minutes are then processor time too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "plan.md"
BEGIN, END = "<!-- accuracy: begin -->\n", "<!-- accuracy: end -->\n"
START = {
    "wall": "from deepspec.cli import main; main()",
    "processor": "import time; time.perf_counter = time.process_time; from deepspec.cli import main; main()",
}
LOAD = "from deepspec.targets import Target; Target.from_pretrained('pocket')"
STEADY = 0.15
"""Shares that differ by less are called steady."""


def timed(words: list[str], cache: Path, clock: str) -> tuple[str, float]:
    """(standard output of a deepspec command, the share of a core that it got)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DEEPSPEC_CACHE": str(cache)}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-c", START[clock], *words]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    after, spent = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    return output, (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / spent


def compare(fast: bool, clock: str) -> dict[str, Any]:
    """One measurement and one run after it: {phase: (predicted, actual)} and both shares."""
    form = ["--fast"] if fast else []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        planned, planning = timed(["plan", "quickstart", *form, "--measure", "--json"], out / "cache", clock)
        _, running = timed(["quickstart", *form, "--out", str(out / "run"), "--json"], out / "cache", clock)
        actual = json.loads((out / "run" / "phases.json").read_text("utf-8"))
    predicted = {name: each["value"] for name, each in json.loads(planned)["phases"].items()}
    return {
        "phases": {name: (predicted[name], actual[name]) for name in predicted},
        "shares": (planning, running),
    }


def table(found: dict[str, Any], fast: bool, clock: str) -> str:
    """Markdown: predicted and actual seconds of each phase, and their ratio."""
    rows = dict(found["phases"])
    rows["all"] = tuple(sum(pair[i] for pair in found["phases"].values()) for i in (0, 1))
    lines = ["| phase | predicted, s | actual, s | predicted / actual |", "|---|---|---|---|"]
    lines += [f"| {name} | {p:.1f} | {a:.1f} | {p / a:.2f} |" for name, (p, a) in rows.items()]
    planning, running = found["shares"]
    form = "quickstart --fast" if fast else "quickstart"
    return (
        "\n".join(lines)
        + f"\n\n`deepspec {form}`, {date.today().isoformat()}, two cores, one thread, {clock} "
        f"seconds; the measurement got {planning:.2f} of a core, the run {running:.2f}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--tries", type=int, default=2, help="again, while the machine's speed drifts")
    parser.add_argument("--clock", choices=START, default="wall")
    parser.add_argument("--write", action="store_true", help="into docs/plan.md")
    given = parser.parse_args()
    # Once before the clock: else only the measurement would find the files not yet in memory.
    subprocess.run([sys.executable, "-c", LOAD], check=True)
    for left in reversed(range(given.tries)):
        found = compare(given.fast, given.clock)
        text = table(found, given.fast, given.clock)
        print(text, flush=True)
        planning, running = found["shares"]
        if (
            given.clock == "processor"
            or abs(planning - running) < STEADY * max(planning, running)
            or not left
        ):
            break
    if given.write:
        before, rest = PAGE.read_text("utf-8").split(BEGIN)
        PAGE.write_text(before + BEGIN + text + END + rest.split(END)[1], "utf-8")


if __name__ == "__main__":
    main()
