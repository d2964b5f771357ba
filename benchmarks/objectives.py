"""Which objective trains the best draft in the same processor time? Objectives by drafts by seeds.

    python benchmarks/objectives.py                        train, measure, write docs/objectives.md
    python benchmarks/objectives.py --seconds 90 --seeds 0 1 2 3
    python benchmarks/objectives.py --parts dspark         one draft only; several commands may run at once
    python benchmarks/objectives.py --page                 write the page from what has been measured so far

All runs learn the same cached features of the pocket target's own answers, from the same first weights
(`draft.init=target`), on one thread. First the processor time of a step is measured for every objective, on
the same batches in turns; each run then takes as many steps as fit into `--seconds`, so that a busy machine
changes nothing. One more run trains Eagle-3 for too long on few answers. τ is measured at T=1 on all prompts
of `pocket:test`. Killed at any moment, the same command continues: a run from its newest checkpoint, and what
was measured is not measured again.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from deepspec.answers.in_process import PACKAGED_ROWS, PACKAGED_TOKENS, regenerate
from deepspec.checkpoints.draft import load_draft
from deepspec.config import Recipe, load_recipe
from deepspec.data.conversations import read_conversations
from deepspec.decode.engine import Decoder, Request
from deepspec.demo import LEARNING_RATE
from deepspec.drafts import ALGORITHMS
from deepspec.features.batches import batches_from
from deepspec.files import write_json, write_text
from deepspec.maths.acceptance import conditional
from deepspec.maths.terms import TERMS
from deepspec.maths.verify import Sampling
from deepspec.measure.evaluate import load_prompts, spread
from deepspec.measure.rows import rounds_of
from deepspec.pocket import prompts_path
from deepspec.targets import Target
from deepspec.this_machine import this_machine
from deepspec.train.build import build_draft, recipe_spec
from deepspec.train.data import cache_features, training_data
from deepspec.train.loop import train_draft
from deepspec.train.optimizer import Optimizer
from deepspec.train.step import train_step
from draft_quality import measure
from objectives_page import LEFT_OUT, PAGE, RESULTS, page

OBJECTIVES: dict[str, dict[str, Any]] = {
    "ce": {"ce": 1.0},
    "ce + l1": {"ce": 1.0, "l1": 0.9},
    "l1": {"l1": 1.0},
    "kl": {"kl": 1.0},
    "reverse_kl": {"reverse_kl": 1.0},
    "lk_alpha": {"lk_alpha": 1.0},
    "lk_lambda": {"lk_lambda": 1.0},
    "dpace": {"ce": 1.0, "positions": "dpace"},
    "l1, survival": {"l1": 1.0, "positions": "survival"},
    "ce + l1, survival": {"ce": 1.0, "l1": 0.9, "positions": "survival"},
}
"""A recipe's `loss` by the objective's name; the weight of the confidence head's loss stays the recipe's."""
ANSWERS, NEW_TOKENS = 900, 48
MEASURED, ROUNDS = 8, 3
"""Steps that are timed together, and how often; the quickest time counts."""
OVERTRAINED = {"rows": 8, "steps": 240, "every": 20}
"""A trained Eagle-3 goes over few answers many times."""


def recipe_of(algorithm: str, objective: str, out: Path, changes: list[str]) -> Recipe:
    """A pocket recipe with an objective in place of its own, on the cached features."""
    zero: dict[str, Any] = dict.fromkeys(TERMS, 0.0) | {"positions": "decay"}
    loss = [f"loss.{key}={value}" for key, value in (zero | OBJECTIVES[objective]).items()]
    fixed = [f"data.features=cache:{out / 'features'}", "draft.init=target", "trackers=[none]"]
    # The last weights are measured, after the run: what chooses a checkpoint costs as little as it can.
    fixed += [f"optim.lr={LEARNING_RATE[algorithm]}", "optim.max_minutes=null", "eval_prompts=1"]
    fixed += ["eval_every_steps=1000000", "eval_max_new_tokens=2"]
    return load_recipe(f"pocket-{algorithm}", [*fixed, *loss, *changes])


def objectives_of(algorithm: str) -> list[str]:
    return [name for name in OBJECTIVES if (algorithm, name) not in LEFT_OUT]


def prepare(target: Target, out: Path) -> None:
    """The target's answers, and its features on them."""
    if (ready := out / "ready").exists():
        return
    rows = spread(list(read_conversations(prompts_path("pocket:train"))), ANSWERS)
    answers = out / "data" / "answers.jsonl"
    regenerate(target, rows, answers, max_new_tokens=PACKAGED_TOKENS, max_rows=PACKAGED_ROWS)
    recipes = [recipe_of(a, "l1", out, ["data.features=online", "optim.max_steps=1"]) for a in ALGORITHMS]
    cache_features(recipes, out / "features", target=target, answers=answers)
    write_text(ready, "")


def step_seconds(target: Target, out: Path, algorithm: str) -> dict[str, float]:
    """Processor seconds of a training step with each objective, all on the same batches in turns."""
    kept = out / f"steps-{algorithm}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    recipes = {o: recipe_of(algorithm, o, out, ["optim.max_steps=1000"]) for o in objectives_of(algorithm)}
    spec = recipe_spec(recipes["ce"], target)
    data = {o: training_data(r, target, spec.target_layer_ids, out, None) for o, r in recipes.items()}
    drafts = {o: build_draft(r, target, spec=spec) for o, r in recipes.items()}
    batches = list(islice(batches_from(data["ce"].rows, recipes["ce"].optim.batch_size, 0, 0), MEASURED))
    best: dict[str, float] = {}
    for turn in range(ROUNDS + 1):
        for name, recipe in recipes.items():
            optimizer, began = Optimizer(drafts[name], recipe.optim), time.process_time()
            for step, (_, rows) in enumerate(batches):
                loss, _ = train_step(drafts[name], data[name].source, rows, recipe, step, False, optimizer)
                optimizer.step(0.1, loss, float("inf"))
            spent = (time.process_time() - began) / MEASURED
            if turn:  # the first turn warms up
                best[name] = min(best.get(name, spent), spent)
    write_json(kept, best)
    return best


def train_and_measure(
    target: Target, out: Path, algorithm: str, objective: str, seed: int, steps: int
) -> None:
    """One run and its counts on the test prompts, as one small file."""
    name = f"{algorithm}-{re.sub('[^a-z0-9_]+', '-', objective)}-{seed}"
    kept = out / "results" / f"{name}.json"
    if kept.exists():
        return
    recipe = recipe_of(
        algorithm, objective, out, [f"optim.max_steps={steps}", f"seed={seed}", f"name={name}"]
    )
    began = time.process_time()
    outcome = train_draft(recipe, out / "runs", target=target)
    if outcome.interrupted:
        raise KeyboardInterrupt
    spent = time.process_time() - began
    counts = measure(target, outcome.best, 1.0, NEW_TOKENS)
    facts = {"algorithm": algorithm, "objective": objective, "seed": seed, "steps": outcome.steps}
    write_json(kept, facts | {"processor_seconds": round(spent, 1), "counts": counts})


def overtrain(target: Target, out: Path) -> dict[str, Any]:
    """The pocket's own Eagle-3, fine-tuned on few answers: metrics, and held-out acceptance by position of
    the best checkpoint and of the last."""
    few, size = out / "data" / "few.jsonl", OVERTRAINED
    lines = (out / "data" / "answers.jsonl").read_text("utf-8").splitlines(keepends=True)
    write_text(few, "".join(lines[: size["rows"]]))
    changes = [f"optim.max_steps={size['steps']}", f"eval_every_steps={size['every']}", "eval_prompts=48"]
    changes += ["eval_max_new_tokens=32", "data.features=online", f"checkpoint_every_steps={size['every']}"]
    changes += ["draft.init=random", "start_from=pocket-eagle3", "optim.lr=2e-3", "name=overtrained"]
    recipe = recipe_of("eagle3", "ce", out, changes)
    outcome = train_draft(recipe, out / "runs", target=target, answers=few)
    if outcome.interrupted:
        raise KeyboardInterrupt
    prompts = dict(enumerate(load_prompts(prompts_path(recipe.data.select), target, limit=48)))
    rates = {}
    for name in ("best", f"step_{outcome.steps}"):
        decoder = Decoder(target, load_draft(outcome.run / "checkpoints" / name, target), max_rows=16)
        requests = [
            Request(p.ids, 32, i, p.id, Sampling(1.0), target.stop_token_ids) for i, p in prompts.items()
        ]
        proposed, accepted, _ = zip(*(rounds_of(answer) for answer in decoder.run(requests)), strict=True)
        rates[name] = conditional(accepted, proposed, recipe.draft.block)
    rows = [json.loads(line) for line in (outcome.run / "metrics.jsonl").read_text().splitlines()]
    return {"answers": size["rows"], "rows": rows, "rates": list(rates.values())}


def collected(out: Path, target: Target, seconds: float) -> dict[str, Any]:
    """What there is so far: of each draft, the seeds that have as many objectives as any."""
    runs = [json.loads(path.read_text()) for path in sorted((out / "results").glob("*.json"))]
    whole = []
    for algorithm in ALGORITHMS:
        own = [run for run in runs if run["algorithm"] == algorithm]
        count = Counter(run["seed"] for run in own)
        whole += [run for run in own if count[run["seed"]] == max(count.values())]
    steps = {a: out / f"steps-{a}.json" for a in ALGORITHMS}
    return {
        "seconds": seconds,
        "machine": this_machine(),
        "step_seconds": {a: json.loads(path.read_text()) for a, path in steps.items() if path.exists()},
        "domains": {p.id: p.domain for p in load_prompts(prompts_path("pocket:test"), target)},
        "runs": whole,
        "overtrained": json.loads(path.read_text()) if (path := out / "overtrained.json").exists() else {},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="processor seconds of training per run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parts = [*ALGORITHMS, "overtrained"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="several may run at once")
    parser.add_argument("--out", default="runs/objectives")
    parser.add_argument("--page", action="store_true", help="only write the page, from what there is")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    out, target = Path(arguments.out), Target.from_pretrained("pocket")
    if not arguments.page:
        prepare(target, out)
        for seed in arguments.seeds:
            for algorithm in [part for part in arguments.parts if part in ALGORITHMS]:
                for objective, cost in step_seconds(target, out, algorithm).items():
                    steps = round(arguments.seconds / cost)
                    train_and_measure(target, out, algorithm, objective, seed, steps)
        if "overtrained" in arguments.parts:
            write_json(out / "overtrained.json", overtrain(target, out))
    if any(out.glob("results/*.json")):
        write_text(RESULTS, json.dumps(collected(out, target, arguments.seconds)) + "\n")
    write_text(PAGE, page(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
