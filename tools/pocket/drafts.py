"""Train the ready-made drafts of the pocket target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from deepspec.answers.in_process import PACKAGED_ROWS, PACKAGED_TOKENS, regenerate
from deepspec.config import load_recipe
from deepspec.data.conversations import read_conversations
from deepspec.drafts import ALGORITHMS
from deepspec.pocket import prompts_path
from deepspec.targets import Target
from deepspec.train.loop import Outcome, train_draft


def train_pocket_drafts(
    out: Path | str, *, minutes: float = 30.0, samples: int = 4, seed: int = 0
) -> dict[str, Outcome]:
    """Train the ready-made drafts on `samples` answers to every training prompt, for `minutes` each."""
    out = Path(out)
    target = Target.from_pretrained("pocket")
    answers = out / "answers.jsonl"
    prompts = list(read_conversations(prompts_path("pocket:train")))
    for k in range(samples):
        some = [replace(c, id=f"{c.id}.{k}") if k else c for c in prompts]
        regenerate(target, some, answers, max_new_tokens=PACKAGED_TOKENS, max_rows=PACKAGED_ROWS)
    outcomes = {}
    for algorithm in ALGORITHMS:
        recipe = load_recipe(f"pocket-{algorithm}", [f"optim.max_minutes={minutes}", f"seed={seed}"])
        outcomes[algorithm] = train_draft(recipe, out, target=target, answers=answers)
        if outcomes[algorithm].interrupted:
            raise KeyboardInterrupt
    return outcomes
