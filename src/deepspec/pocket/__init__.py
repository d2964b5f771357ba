"""The embedded target, its drafts and its prompts: a real language model small enough to ship."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parent / "data"
DRAFTS = ("pocket-eagle3", "pocket-dflash", "pocket-dspark", "pocket-eagle3-portable")
MODELS = ("pocket", *DRAFTS)


def packaged(name: str) -> str:
    """The directory of a model that ships with the package; any other name as it is."""
    return str(DATA / name) if name in MODELS else name


def prompt_file(split: str) -> Path:
    """The packaged JSONL of a split: train, select or test."""
    return DATA / "prompts" / f"{split}.jsonl"
