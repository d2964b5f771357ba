"""What a checkpoint records about its data, its target and its recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from deepspec.checkpoints.draft import find_checkpoint, load_provenance
from deepspec.config import Recipe
from deepspec.data.conversations import Conversation, content_hash, read_conversations
from deepspec.data.tokens import system_hash, template_hash, tokenizer_hash
from deepspec.report.compare import MODE
from deepspec.targets import Target


def data_facts(source: Path, limit: int | None = None) -> dict[str, Any]:
    """What a checkpoint says of a file of answers. `data`: the conditions that they carry and share.

    limit: of its first rows.
    """
    carried: dict[str, Any] = {}
    count = 0

    def noting() -> Iterator[Conversation]:
        nonlocal count
        for row in islice(read_conversations(source), limit):
            count += 1
            facts = {key: row.meta.get(key) for key in ("target", *MODE, "sampling")}
            facts["system_prompt"] = system_hash(row.messages)
            for key, value in facts.items():
                carried[key] = only_one(carried.get(key, value), value)
            yield row

    return {"data_hash": content_hash(noting()), "data_rows": count, "data": carried}


def provenance(recipe: Recipe, target: Target, about: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of where it came from. about: `data_facts` of its training data."""
    assert target.tokenizer is not None
    carried = about["data"]
    return {
        "target": target.spec.name,
        "target_config_hash": target.spec.config_hash,
        "tokenizer_hash": tokenizer_hash(target.tokenizer),
        "template_hash": template_hash(target.tokenizer),
        "thinking": recipe.thinking,
        "system_prompt": carried["system_prompt"],
        "sampling": carried["sampling"],
        **about,
        "started_from": started_from(recipe),
        "recipe": recipe.model_dump(mode="json"),
    }


def only_one(so_far: Any, value: Any) -> Any:
    """The value that all rows share, or "several"."""
    return so_far if so_far == value else "several"


def started_from(recipe: Recipe) -> dict[str, Any] | None:
    """Which draft a fine-tuned one began as, and under what conditions that one was trained."""
    if recipe.start_from is None:
        return None
    facts = load_provenance(find_checkpoint(recipe.start_from))
    return {"draft": recipe.start_from} | {k: facts.get(k) for k in (*MODE, "data_hash", "step")}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """A run's metrics.jsonl; empty for a packaged draft."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
