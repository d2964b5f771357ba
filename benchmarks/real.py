"""A real model from end to end: SmolLM2-135M, from the GGUF file in its package to served drafts.

    make real                                   about two hours on two cores; the same command continues
    make real ARGS=--fast                       a smoke run, in a folder of its own
    make real ARGS="--fast --model gemma"       Gemma-3-270m, a base model: trained and evaluated, not served
    python benchmarks/real.py --page RESULTS    only write docs/real.md from a results file

Every step but the comparison in llama-server is a command that a user could type; it is printed before it
runs. A step that has finished leaves a file in `done/` and is not run again; one that was cut off continues
where it stopped, as its command does. Prompts for training are the package's own. Held-out prompts are the
package's test set and, if they are there, six public benchmarks in ../shared/data/eval; nothing is trained
on these.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import real_page
import servers
from deepspec.checkpoints.draft import load_draft
from deepspec.checkpoints.export import Exported
from deepspec.drafts.base import NeuralDraft
from deepspec.files import write_json
from deepspec.log import note
from deepspec.measure import profile as profiling
from deepspec.measure.evaluate import load_prompts
from deepspec.targets import Target
from deepspec.this_machine import this_machine
from real_models import MODELS, Model, fetch, held_out
from real_served import PLAIN, agreement, compared, decoded, passes, served

ROOT = Path(__file__).parents[1]
RECIPES = {name: f"{name}/small" for name in ("dspark", "dflash", "eagle3")}
WIDTHS = (1, 2, 3, 5, 8)
"""New tokens of the passes that are timed: a round of γ proposals is a pass of γ + 1."""


@dataclass(frozen=True)
class Size:
    """How much is done: answers to train on, minutes for each draft, held-out prompts, new tokens for each,
    and how many of the prompts are decoded one at a time in this process, for its speeds."""

    answers: int = 2400
    minutes: float = 18
    prompts: int = 60
    tokens: int = 96
    timed: int = 24


FAST = Size(answers=32, minutes=0.5, prompts=9, tokens=24, timed=3)


@dataclass(frozen=True)
class Work:
    """The folder of a run, its size, and its target."""

    folder: Path
    size: Size
    model: Model

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def once(self, name: str, step: Callable[[], Any]) -> Any:
        """What a step returned, from its file in done/ if it has finished before."""
        path = self / "done" / f"{name}.json"
        if not path.is_file():
            note(f"── {name} ({datetime.now(UTC):%H:%M} UTC)")
            began, result = time.monotonic(), step()
            path.parent.mkdir(exist_ok=True)
            write_json(path, {"seconds": time.monotonic() - began, "result": result})
        return json.loads(path.read_text("utf-8"))["result"]

    def seconds(self, name: str) -> float:
        found: float = json.loads((self / "done" / f"{name}.json").read_text("utf-8"))["seconds"]
        return found


def deepspec(*words: object) -> None:
    """Run one of our own commands, shown so that it can be typed."""
    command = [*map(str, words)]
    note(f"$ deepspec {shlex.join(command)}")
    code = subprocess.run([sys.executable, "-m", "deepspec", *command]).returncode
    if code:
        raise SystemExit(code)


# ── the steps ─────────────────────────────────────────────────────────────────────────────────────────


def fetched(work: Work) -> None:
    """The GGUF file, and the target as a directory, which starts faster."""
    fetch(work.model, work.folder)
    if not (work / "target" / "config.json").is_file():
        deepspec("target", "convert", work / work.model.file, "--out", work / "target")


def answers(work: Work) -> None:
    deepspec(
        *("data", "regenerate", "pocket:train", "--out", work / "answers.jsonl", "--target", work / "target"),
        *("--limit", work.size.answers, "--batch", 32, "--max-new-tokens", 128),
        *work.model.sampling,
    )


def settings(work: Work) -> list[str]:
    return [
        f"target={work / 'target'}",
        f"data.train={work / 'answers.jsonl'}",
        f"optim.max_minutes={work.size.minutes:g}",
        "trackers=[]",
    ]


def features(work: Work) -> None:
    deepspec("data", "cache", *RECIPES.values(), *settings(work), "--out", work / "features")


def train(work: Work, name: str) -> None:
    words = [*settings(work), f"data.features=cache:{work / 'features'}", f"name={name}"]
    deepspec("train", RECIPES[name], *words, "--runs", work / "runs")


def export(work: Work, name: str) -> None:
    draft, out = work / "runs" / name, work / f"{name}.gguf"
    words = ("--target", work / "target", "--target-gguf", work / work.model.file, "--dtype", "float16")
    deepspec("export", draft, "--to", "gguf", *words, "--out", out)


def evaluate(work: Work) -> dict[str, Any]:
    drafts = [word for name in RECIPES for word in ("--draft", work / "runs" / name)]
    out = work / "eval.json"
    deepspec(
        *("eval", "--target", work / "target", *drafts, "--prompts", work / "held.jsonl", "--no-baselines"),
        *("--limit", work.size.timed, "--max-new-tokens", work.size.tokens, "--out", out),
    )
    found: dict[str, Any] = json.loads(out.read_text("utf-8"))
    return found


def our_steps(target: Target, work: Work) -> dict[str, Any]:
    """Milliseconds of our passes with so many new tokens, and of a draft's proposals. On one thread it is
    processor time, of which nothing goes to other programs."""
    if torch.get_num_threads() == 1:
        profiling.clock = lambda device: time.process_time()
    found: dict[str, Any] = {"target": {}, "propose": {}}
    for name in RECIPES:
        draft = load_draft(str(work / "runs" / name), target)
        costs = profiling.profile(target, draft, profiling.Grid((1,), WIDTHS, (64,)), sweeps=5, seconds=30)
        assert costs.propose is not None
        for width, seconds in zip(costs.widths, costs.target[0, :, 0], strict=True):
            found["target"][str(width)] = 1000 * float(seconds)
        found["propose"][name] = 1000 * float(costs.propose[0, 0])
    return found


def measure(work: Work) -> dict[str, Any]:
    """Every step that is not done yet; the results."""
    work.folder.mkdir(parents=True, exist_ok=True)
    work.once("fetch", lambda: fetched(work))
    work.once("held-out prompts", lambda: held_out(work / "held.jsonl", work.size.prompts))
    work.once("answers", lambda: answers(work))
    work.once("features", lambda: features(work))
    for name in RECIPES:
        work.once(f"train {name}", lambda name=name: train(work, name))
    evaluated = work.once("evaluate", lambda: evaluate(work))
    target = Target.from_pretrained(str(work / "target"), dtype="float32", device="cpu")
    ours = work.once("steps", lambda: our_steps(target, work))
    in_server = in_llama_server(work, target) if work.model.served else {}
    training = {name: trained(work / "runs" / name / "metrics.jsonl") for name in RECIPES}
    seconds = {p.stem: work.seconds(p.stem) for p in sorted((work / "done").glob("*.json"))}
    # A run that was cut off counts its own time.
    seconds |= {f"train {name}": last["seconds"] for name, last in training.items()}
    return {
        "created": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": this_machine(),
        "threads": torch.get_num_threads(),
        "model": work.model.title,
        "size": asdict(work.size),
        "answers": timings(work / "answers.timings.jsonl"),
        "seconds": seconds,
        "training": training,
        "evaluated": [
            {k: row[k] for k in ("method", "kind", "block", "overall", "lossless")}
            for row in evaluated["rows"]
        ],
        "steps": ours,
        **in_server,
    }


def in_llama_server(work: Work, target: Target) -> dict[str, Any]:
    """The drafts exported, and served by llama-server from the file as it was shipped."""
    for name in RECIPES:
        work.once(f"export {name}", lambda name=name: export(work, name))
    file, log, budget = work / work.model.file, work / "server.log", work.size.tokens
    prompts = load_prompts(work / "held.jsonl", target, limit=work.size.prompts)
    drafts = {name: load_draft(str(work / "runs" / name), target) for name in RECIPES}
    words = {PLAIN: [], **{name: draft_words(work, name, draft) for name, draft in drafts.items()}}
    theirs = work.once("serve", lambda: served(file, log, prompts, budget, words))
    rows = {}
    for name, draft in drafts.items():
        ours = work.once(f"decode {name}", lambda d=draft: decoded(target, d, prompts, budget))
        answers = [theirs[PLAIN], theirs[name], ours]
        rows[name] = work.once(f"compare {name}", lambda a=answers: compared(target, prompts, *a))
    return {
        "served": rows,
        "server_steps": work.once("passes", lambda: passes(file, log, WIDTHS)),
        "agreement": work.once("agreement", lambda: agreement(target, file, log)),
    }


def draft_words(work: Work, name: str, draft: NeuralDraft) -> list[str]:
    """llama-server's options for an exported draft."""
    exported = Exported(work / f"{name}.gguf", "gguf", "", draft.spec.proposals, "F16", 0, [], [])
    return servers.draft_words(draft, exported)


def timings(path: Path) -> dict[str, float]:
    """Rows, tokens and seconds of all answers."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {key: sum(line.get(key, 0) for line in lines) for key in ("rows", "tokens", "seconds")}


def trained(path: Path) -> dict[str, Any]:
    """The last line of a run's metrics."""
    last: dict[str, Any] = json.loads(path.read_text("utf-8").splitlines()[-1])
    return last


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fast", action="store_true", help="a smoke run of a few minutes")
    parser.add_argument("--model", choices=MODELS, default="smollm2", help="default: %(default)s")
    parser.add_argument("--work", type=Path, help="the run's folder (runs/real-MODEL)")
    parser.add_argument("--page", type=Path, metavar="RESULTS", help="write docs/real.md from a results file")
    for field in fields(Size):
        parser.add_argument(f"--{field.name}", type=type(field.default), help="default: %(default)s")
    given = parser.parse_args()
    if given.page:
        real_page.write(json.loads(given.page.read_text("utf-8")))
        return
    changed = {f.name: getattr(given, f.name) for f in fields(Size) if getattr(given, f.name) is not None}
    size = replace(FAST if given.fast else Size(), **changed)
    name = f"real-{given.model}" + ("-fast" if given.fast else "")
    work = Work((given.work or ROOT / "runs" / name).resolve(), size, MODELS[given.model])
    results = measure(work)
    write_json(work / "results.json", results)
    print(real_page.page(results) if work.model.served else real_page.summary(results))
    note(f"results: {work / 'results.json'}")
    if work.model.served:
        note(f"python benchmarks/real.py --page {work / 'results.json'}  # writes docs/real.md")


if __name__ == "__main__":
    main()
