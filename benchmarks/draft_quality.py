"""Which draft is better for the same money? Three algorithms, several seeds, one budget.

    python benchmarks/draft_quality.py --minutes 1.5 --seeds 0 1 2        equal wall-clock (primary)
    python benchmarks/draft_quality.py --steps 300 --seeds 0 1 2          equal tokens

Every run trains on the same answers with the shipped pocket recipes; nothing but the budget is changed.
τ is measured at T=1 on all held-out test prompts (`pocket:test`, neither trained on nor used to pick
checkpoints). Differences are paired over prompts, the seeds' counts added up per prompt.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path

import torch

from deepspec.answers.in_process import answered
from deepspec.checkpoints.draft import load_draft
from deepspec.config import load_recipe
from deepspec.decode.engine import Decoder, Request
from deepspec.drafts import ALGORITHMS
from deepspec.maths.acceptance import bootstrap_ratio, paired_bootstrap_difference
from deepspec.maths.verify import Sampling
from deepspec.measure.evaluate import load_prompts
from deepspec.measure.rows import rounds_of
from deepspec.pocket import prompts_path
from deepspec.targets import Target
from deepspec.train.loop import train_draft


def measure(
    target: Target, checkpoint: Path | str, temperature: float, max_new_tokens: int, *, thinking: bool = False
) -> dict[str, list[int]]:
    """{prompt id: [tokens kept, rounds]} of a draft on the test prompts, sixteen rows at a time."""
    prompts = load_prompts(prompts_path("pocket:test"), target, thinking=thinking)
    draft = load_draft(checkpoint, target)
    decoder = Decoder(target, draft, max_rows=16)
    sampling, stops = Sampling(temperature), target.stop_token_ids
    requests = [Request(p.ids, max_new_tokens, i, p.id, sampling, stops) for i, p in enumerate(prompts)]
    kept = {g.key: rounds_of(g)[2] for g in decoder.run(requests)}
    return {p.id: [sum(kept[p.id]), len(kept[p.id])] for p in prompts}


def run(arguments: argparse.Namespace) -> None:
    """Train and measure every algorithm and seed; one small JSON file each."""
    out = Path(arguments.out)
    target = Target.from_pretrained("pocket")
    answers = Path(arguments.answers) if arguments.answers else answered("pocket:train", target, False, out)
    for seed in arguments.seeds:
        for algorithm in arguments.algorithms:
            budget = (
                [f"optim.max_steps={arguments.steps}", "optim.max_minutes=null"]
                if arguments.steps
                else [f"optim.max_minutes={arguments.minutes}"]
            )
            recipe = load_recipe(f"pocket-{algorithm}", [*budget, f"seed={seed}", "trackers=[none]"])
            outcome = train_draft(recipe, out / f"seed-{seed}", target=target, answers=answers)
            counts = measure(target, outcome.best, 1.0, 96)
            facts = {
                "counts": counts,
                "steps": outcome.steps,
                "tokens": outcome.tokens,
                "seconds": outcome.seconds,
            }
            (out / f"{algorithm}-{seed}.json").write_text(json.dumps(facts))


def summary(out: Path) -> dict[str, object]:
    """τ per algorithm, seeds pooled per prompt, and paired differences."""
    files = {a: sorted(out.glob(f"{a}-*.json")) for a in ALGORITHMS}
    runs = {a: [json.loads(f.read_text()) for f in found] for a, found in files.items() if found}
    totals: dict[str, tuple[list[float], list[float]]] = {}
    shown: dict[str, object] = {}
    for algorithm, found in runs.items():
        ids = list(found[0]["counts"])
        kept = [float(sum(r["counts"][i][0] for r in found)) for i in ids]
        rounds = [float(sum(r["counts"][i][1] for r in found)) for i in ids]
        totals[algorithm] = kept, rounds
        each = [
            sum(c[0] for c in r["counts"].values()) / sum(c[1] for c in r["counts"].values()) for r in found
        ]
        shown[algorithm] = {
            "tau": bootstrap_ratio(kept, rounds, 0),
            "per_seed": each,
            "steps": [r["steps"] for r in found],
            "tokens": [r["tokens"] for r in found],
            "seconds": [round(r["seconds"], 1) for r in found],
        }
    for a, b in combinations(totals, 2):
        shown[f"{b} - {a}"] = paired_bootstrap_difference(totals[b], totals[a], 0)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.5)
    parser.add_argument("--steps", type=int, help="an equal number of steps instead of minutes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS))
    parser.add_argument("--out", default="runs/draft-quality")
    parser.add_argument("--answers", help="answered training conversations; made when not given")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    run(arguments)
    print(json.dumps(summary(Path(arguments.out)), indent=1))


if __name__ == "__main__":
    main()
