"""What thinking mode costs a draft that never saw it, and what fine-tuning brings back.

    python benchmarks/thinking.py --minutes 3

τ in thinking mode, on all held-out test prompts, of (a) the ready-made DSpark draft, trained on answers
without thoughts; (b) that draft fine-tuned on thinking answers (`start_from`) for some minutes; (c) a fresh
draft trained on the same answers for the same minutes. Differences are paired over prompts.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path

import torch

from deepspec.answers.in_process import answered
from deepspec.config import load_recipe
from deepspec.maths.acceptance import bootstrap_ratio, paired_bootstrap_difference
from deepspec.targets import Target
from deepspec.train.loop import train_draft
from draft_quality import measure

READY_MADE = "pocket-dspark"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--tuning-lr", type=float, default=1e-3, help="a quarter of the fresh draft's")
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--out", default="runs/thinking")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    out, target = Path(arguments.out), Target.from_pretrained("pocket")
    answers = answered("pocket:train", target, True, out)
    common = ["thinking=true", f"optim.max_minutes={arguments.minutes}", "trackers=[none]"]
    changes = {
        "fine-tuned": [f"start_from={READY_MADE}", f"optim.lr={arguments.tuning_lr}"],
        "fresh": [],
    }
    drafts: dict[str, Path | str] = {"not trained on thinking": READY_MADE}
    for name, change in changes.items():
        recipe = load_recipe(READY_MADE, [*common, *change, f"name={name}"])
        drafts[name] = train_draft(recipe, out, target=target, answers=answers).best
    counts = {
        name: measure(target, draft, 1.0, arguments.max_new_tokens, thinking=True)
        for name, draft in drafts.items()
    }
    totals = {
        name: ([float(kept) for kept, _ in found.values()], [float(rounds) for _, rounds in found.values()])
        for name, found in counts.items()
    }
    shown: dict[str, object] = {name: bootstrap_ratio(*total, 0) for name, total in totals.items()}
    for a, b in combinations(totals, 2):
        shown[f"{b} - {a}"] = paired_bootstrap_difference(totals[b], totals[a], 0)
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
