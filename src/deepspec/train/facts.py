"""What a checkpoint records about its data, its target and its recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import deepspec
from deepspec.checkpoints.read import find_checkpoint, load_provenance
from deepspec.conditions import LABELS, SEVERAL, Conditions
from deepspec.config import Recipe, feature_source
from deepspec.data.conversations import Conversation, content_hash, read_conversations
from deepspec.data.skipping import Skipped
from deepspec.data.template import template_conditions
from deepspec.data.tokens import system_hash, tokenizer_hash
from deepspec.features.cache_write import INDEX
from deepspec.files import count_lines
from deepspec.log import flatten, progress
from deepspec.pocket import prompts_path
from deepspec.targets import Target, TargetSpec

CARRIED = (*LABELS, "sampling")
"""The conditions that answered rows carry."""


def data_facts(source: Path, limit: int | None = None, *, skip_bad: bool = False) -> dict[str, Any]:
    """The hash and number of a file's rows, or of its first `limit`; under `data` the target and the
    conditions that they share. skip_bad: rows that cannot be read do not count."""
    targets: set[str | None] = set()
    shared: Conditions | None = None
    count = 0

    def noting() -> Iterator[Conversation]:
        nonlocal shared, count
        for row in islice(read_conversations(source, skipped=Skipped() if skip_bad else None), limit):
            count += 1
            carried = dict.fromkeys(CARRIED) | row.meta | {"system_prompt": system_hash(row.messages)}
            found = Conditions.read({key: carried[key] for key in CARRIED})
            shared = found if shared is None else shared.shared(found)
            targets.add(row.meta.get("target"))
            bar.update(1)
            yield row

    with progress("reading the answers", limit or count_lines(source)) as bar:
        digest = content_hash(noting())
    record = {} if shared is None else shared.record()
    target = targets.pop() if len(targets) == 1 else SEVERAL
    return {"data_hash": digest, "data_rows": count, "data": {"target": target, **record}}


def file_hash(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def code_hash(room: str = "") -> str:
    """16 hex digits of the source of this package, or of one of its folders."""
    root, digest = Path(deepspec.__file__).parent / room, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def shared_facts(recipe: Recipe, target: Target | TargetSpec, answers: Path | None) -> dict[str, Any]:
    """What the processes of a job must have in common: code, recipe, target and data, as hashes."""
    form, place = feature_source(recipe.data.features)
    files = {"data.select": prompts_path(recipe.data.select), "data.train": answers}
    if form == "cache":
        files["data.features"] = Path(place) / INDEX
    elif answers is None:
        files["data.train"] = prompts_path(recipe.data.train)
    spec = target if isinstance(target, TargetSpec) else target.spec
    return {
        "the code of deepspec": code_hash(),
        "torch": torch.__version__,
        "the target's config": spec.config_hash,
        **{f"the recipe's {key}": value for key, value in flatten(recipe.model_dump(mode="json")).items()},
        **{f"the file of {key}": file_hash(path)[:16] for key, path in files.items() if path is not None},
    }


def provenance(recipe: Recipe, target: Target, about: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says about where it came from. about: `data_facts` of its training data."""
    assert target.tokenizer is not None
    now = replace(
        template_conditions(target.tokenizer, recipe.thinking),
        system_prompt=about["data"]["system_prompt"],
        tokenizer_hash=tokenizer_hash(target.tokenizer),
        sampling=about["data"]["sampling"],
    )
    began_as = None
    if recipe.start_from is not None:
        before = load_provenance(find_checkpoint(recipe.start_from))
        began_as = {"draft": recipe.start_from} | {k: before.get(k) for k in (*LABELS, "data_hash", "step")}
    return {
        "target": target.spec.name,
        "target_config_hash": target.spec.config_hash,
        **now.record(),
        **about,
        "started_from": began_as,
        "recipe": recipe.model_dump(mode="json"),
    }
