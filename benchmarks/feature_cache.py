"""What a feature cache costs on disk, what it does to a draft, and how fast it is written and read.

    python benchmarks/feature_cache.py --answers answers.jsonl --tau        train and measure (resumable)
    python benchmarks/feature_cache.py --answers answers.jsonl --speed      sizes, writing, reading
    python benchmarks/feature_cache.py --write                              the tables of docs/features.md

τ: every draft trains with the shipped pocket recipe, the same answers, seeds and number of steps; only the
source of its features differs. It is measured at T=1 on all 120 held-out prompts after the last step;
differences are paired over prompts, the seeds' counts added up per prompt.

Speed: ratios taken in one process. The disk alone is a plain sequential write with fsync, and a plain
sequential read after the page cache has dropped the file, of as many bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from deepspec.acceptance import bootstrap_ratio, paired_bootstrap_difference
from deepspec.config import load_recipe
from deepspec.target import Target
from deepspec.workflow import ALGORITHMS, cache_features, train_draft
from draft_quality import measure

PAGE = Path(__file__).parents[1] / "docs" / "features.md"
FORMATS = ("bf16", "fp8", "int8")
SOURCES = ("online", *FORMATS)
TRAINING = [
    "optim.max_minutes=null",
    "eval_every_steps=100000",
    "eval_prompts=2",
    "eval_max_new_tokens=8",
    "trackers=[none]",
]
Results = dict[str, Any]


# ── accepted length ───────────────────────────────────────────────────────────────────────────────────


def caches(target: Target, answers: Path, out: Path) -> dict[str, Path]:
    """One cache per format, each serving all three recipes."""
    recipes = [load_recipe(f"pocket-{a}") for a in ALGORITHMS]
    found = {}
    for form in FORMATS:
        found[form] = out / f"cache-{form}"
        cache_features(recipes, found[form], target=target, answers=answers, dtype=form)
    return found


def train_and_measure(arguments: argparse.Namespace) -> None:
    """One small JSON file per draft, source and seed; those that are there are not made again."""
    out, answers = Path(arguments.out), Path(arguments.answers)
    target = Target.from_pretrained("pocket")
    where = {form: f"cache:{path}" for form, path in caches(target, answers, out).items()} | {
        "online": "online"
    }
    for seed in arguments.seeds:
        for algorithm in arguments.algorithms:
            for source in SOURCES:
                file = out / "tau" / f"{algorithm}-{source}-{seed}.json"
                if file.exists():
                    continue
                changes = [
                    f"optim.max_steps={arguments.steps}",
                    f"seed={seed}",
                    f"data.features={where[source]}",
                    f"name={algorithm}-{source}-{seed}",
                ]
                recipe = load_recipe(f"pocket-{algorithm}", [*TRAINING, *changes])
                outcome = train_draft(recipe, out / "runs", target=target, answers=answers)
                facts = {
                    "counts": measure(target, outcome.best, 1.0, 96),
                    "steps": outcome.steps,
                    "tokens": outcome.tokens,
                    "seconds": outcome.seconds,
                }
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(facts))
                print(file, flush=True)


def tau_summary(out: Path) -> Results:
    """τ per draft and source, seeds pooled per prompt, and differences to online paired over prompts."""
    shown: Results = {}
    for algorithm in ALGORITHMS:
        totals: dict[str, tuple[list[float], list[float]]] = {}
        for source in SOURCES:
            found = [json.loads(f.read_text()) for f in sorted(out.glob(f"tau/{algorithm}-{source}-*.json"))]
            if not found:
                continue
            ids = list(found[0]["counts"])
            totals[source] = (
                [float(sum(r["counts"][i][0] for r in found)) for i in ids],
                [float(sum(r["counts"][i][1] for r in found)) for i in ids],
            )
            entry = {
                "tau": bootstrap_ratio(*totals[source], 0),
                "seeds": len(found),
                "steps": found[0]["steps"],
                "tokens": sum(r["tokens"] for r in found),
            }
            if source != "online":
                entry["minus_online"] = paired_bootstrap_difference(totals[source], totals["online"], 0)
            shown[f"{algorithm} {source}"] = entry
    return shown
