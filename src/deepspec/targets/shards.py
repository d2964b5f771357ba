"""Weights on disk: one safetensors file, or shards with an index. Errors name the file that cannot be read.

Drafts are read with these functions. A target's weights are read by transformers, and are opened here only if
that fails, to find the file at fault.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepspec.errors import CheckpointError

Shape = tuple[int, ...]
T = TypeVar("T")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a single-file or sharded checkpoint. Raises CheckpointError."""
    return _each(path, lambda opened, key: opened.get_tensor(key))


def read_headers(path: Path) -> dict[str, tuple[Shape, str]]:
    """(shape, number format) of every stored tensor, from the headers of the files; no weights are loaded.

    Formats are spelt as in safetensors: F32, BF16, … Raises CheckpointError.
    """

    def header(opened: Any, key: str) -> tuple[Shape, str]:
        part = opened.get_slice(key)
        return tuple(part.get_shape()), str(part.get_dtype())

    return _each(path, header)


def _each(path: Path, take: Callable[[Any, str], T]) -> dict[str, T]:
    """{name without prefixes: take(open file, name)} for every tensor. Raises CheckpointError."""
    found: dict[str, T] = {}
    for file in weight_files(path):
        try:
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118 - a safetensors handle, not a dict
                    found[key.removeprefix("_orig_mod.").removeprefix("model.")] = take(opened, key)
        except SafetensorError as error:
            pointer = file.read_bytes()[:40].startswith(b"version https://git-lfs")
            raise CheckpointError(
                "the file is a Git LFS pointer, not the weights"
                if pointer
                else f"the file is torn or not safetensors ({error})",
                where=str(file),
                next_step="run `git lfs pull` there" if pointer else "copy or download it again",
            ) from error
    return found


def weight_files(path: Path) -> list[Path]:
    """The single file, or the shards that the index names. Raises CheckpointError."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise CheckpointError(
            "there is no model.safetensors",
            where=str(path),
            next_step="copy the weights into the directory of config.json",
        )
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            "the index of shards cannot be read", where=str(index), next_step="copy or download it again"
        ) from error
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            "a shard named in the index is missing"
            + (f", and so are {len(missing) - 1} more" if len(missing) > 1 else ""),
            where=str(path / missing[0]),
            next_step=f"copy or download all {len(names)} shards into one directory",
        )
    return [path / name for name in names]
