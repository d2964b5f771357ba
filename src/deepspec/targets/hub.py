"""Models by name: a directory here, a Hub id, or a built-in one; and what to say where it cannot be had."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from deepspec.errors import CheckpointError, TargetError
from deepspec.pocket import packaged
from deepspec.targets.shards import read_headers

DOWNLOAD = "download one where there is a network: `hf download ORG/NAME --local-dir DIR`"


def may_be_hub_id(name: str) -> bool:
    """Whether a name that is no path here can be the Hub's: NAME or ORG/NAME. A path whose first folder is
    here was mistyped, and should not wait for the network."""
    parts = name.split("/")
    shaped = len(parts) <= 2 and all(re.fullmatch(r"\w[\w.-]*", part) for part in parts)
    return shaped and not (len(parts) == 2 and Path(parts[0]).is_dir())


def fetch(name: str, patterns: Sequence[str]) -> Path:
    """The local folder of a Hub repository's files that match, downloaded where they are not cached yet.

    Raises OSError or ValueError, which `unavailable` puts into words.
    """
    return Path(snapshot_download(name, allow_patterns=list(patterns)))


def unavailable(kind: str, name: str, error: BaseException, instead: str) -> tuple[str, str]:
    """(what, next step) for a Hub id that `error` kept from loading. kind: "model" or "draft"; instead: what
    else a name may be, after "give a local directory (…)"."""
    causes = list(_causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return (
            f"{name} is gated on the Hub, and this machine has no access to it",
            "accept its licence on its Hub page and run `hf auth login`, or give a local directory",
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        why = "there is no such repository, or it is private"
    elif any(isinstance(cause, LocalEntryNotFoundError) for cause in causes):
        why = "the Hub cannot be reached, and nothing of it is cached here"
    else:
        why = first_line(error)
    return (
        f"no {kind} {name!r}: not a directory here, and not to be had from the Hub ({why})",
        f"give a local directory ({DOWNLOAD}), {instead}",
    )


def first_line(error: BaseException) -> str:
    """What an error says, without the paragraphs of advice that some carry."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from: transformers wraps the Hub client's errors in its own."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# ── targets, which transformers reads ─────────────────────────────────────────────────────────────────


def locate(name: str) -> str:
    """The path or Hub id behind a target's name. Raises TargetError for what can be neither."""
    path = packaged(name)
    if Path(path).is_dir() or may_be_hub_id(path):
        return path
    if Path(path).is_file():
        raise TargetError(
            f"{name} is a file, and a target is the directory of a Hugging Face model",
            next_step="give the directory that holds config.json, the weights and the tokenizer",
        )
    raise TargetError(
        f"no model {name!r}: there is no such directory",
        next_step=f"give a local directory ({DOWNLOAD}), a Hub id, or the built-in `pocket`",
    )


def unreadable(name: str, path: str, error: Exception, *, weights: bool = False) -> TargetError:
    """Why a model's config, or its weights, could not be read: the file at fault where it can be told, else
    transformers' own words."""
    if not Path(path).is_dir():
        what, next_step = unavailable("model", name, error, "a Hub id, or the built-in `pocket`")
        return TargetError(what, next_step=next_step)
    if "custom code" in str(error):
        return TargetError(
            f"{name} brings modelling code of its own, which is not run here",
            where=path,
            next_step="use a checkpoint of a family that transformers itself knows (docs/targets.md)",
        )
    if weights and not list(Path(path).glob("*.bin")):
        try:
            read_headers(Path(path))
        except CheckpointError as found:
            return TargetError(
                f"{name} cannot be loaded: {found.what}", where=found.where, next_step=found.next_step
            )
    return TargetError(
        f"{name} is not a model that transformers can load: {first_line(error)}",
        where=path,
        next_step="check that the directory holds config.json and the weights of a Hugging Face decoder, "
        "whole and of one model",
    )


def check_whole(name: str, path: str, missing: Collection[str]) -> None:
    """Raise TargetError where transformers filled weights that the files lack with random numbers."""
    if missing:
        some = ", ".join(sorted(missing)[:3]) + (" …" if len(missing) > 3 else "")
        raise TargetError(
            f"{name} lacks {len(missing)} of the tensors that its config describes: {some}",
            where=path,
            next_step="copy or download all of its files again, from one model",
        )
