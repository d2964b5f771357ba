"""Models by name: a local directory, a Hub id, or a built-in name, and the errors if one is not available."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from deepspec.connections import check_hub
from deepspec.errors import CheckpointError, TargetError, causes, first_line
from deepspec.pocket import packaged
from deepspec.targets.gguf_file import find_gguf
from deepspec.targets.shards import read_headers

DOWNLOAD = "to download one, run `hf download ORG/NAME --local-dir DIR` on a machine with a network"


def may_be_hub_id(name: str) -> bool:
    """Whether a name that is not a local path can be a Hub id: NAME or ORG/NAME. If the first folder of the
    path exists, the path was mistyped, and the user should not have to wait for the network."""
    parts = name.split("/")
    shaped = len(parts) <= 2 and all(re.fullmatch(r"\w[\w.-]*", part) for part in parts)
    return shaped and not (len(parts) == 2 and Path(parts[0]).is_dir())


def fetch(name: str, patterns: Sequence[str]) -> Path:
    """The local folder with the files of a Hub repository that match; what is not cached yet is downloaded.

    Raises OSError or ValueError, which `unavailable` turns into a message, and ServerError (`check_hub`).
    """
    check_hub()
    return Path(snapshot_download(name, allow_patterns=list(patterns)))


def unavailable(kind: str, name: str, error: BaseException, instead: str) -> tuple[str, str]:
    """(what is wrong, next step) for a Hub id that could not be loaded because of `error`. kind: "model" or
    "draft"; instead: what else may be given, to follow "give a local directory,"."""
    found = list(causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in found):
        return (
            f"{name} is gated on the Hub, and you are not logged in with an account that has access",
            "accept its licence on its Hub page and run `hf auth login`, or give a local directory",
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in found):
        why = "there is no such repository, or it is private"
    elif any(isinstance(cause, LocalEntryNotFoundError) for cause in found):
        why = "the Hub cannot be reached, and no copy is cached here"
    else:
        why = first_line(error)
    return (
        f"{name!r} is not a local directory, and no {kind} of that name could be loaded from the Hub: {why}",
        f"check the name, or give a local directory ({DOWNLOAD.replace('ORG/NAME', name)}), {instead}",
    )


# ── targets, which transformers loads ─────────────────────────────────────────────────────────────────


def locate(name: str) -> str:
    """The path or Hub id behind a target's name. Raises TargetError if it can be neither, and ServerError if
    the Hub cannot be asked (`check_hub`)."""
    path = packaged(name)
    if Path(path).is_dir() or find_gguf(path) is not None:
        return path
    if Path(path).is_file():
        raise TargetError(
            f"{name} is a file that is not GGUF, and a target is a GGUF file or a Hugging Face directory",
            next_step="give the directory that holds config.json, the weights and the tokenizer",
        )
    if may_be_hub_id(path) and not path.lower().endswith(".gguf"):
        check_hub()
        return path
    raise TargetError(
        f"no model named {name!r} was found: there is no such directory or file",
        next_step=f"give a local directory ({DOWNLOAD}), a GGUF file, a Hub id, or the built-in `pocket`",
    )


def unreadable(name: str, path: str, error: Exception, *, weights: bool = False) -> TargetError:
    """The error for a model whose config or weights could not be read. It names the file at fault if that can
    be found out, and repeats transformers' message otherwise."""
    if not Path(path).is_dir():
        what, next_step = unavailable("model", name, error, "or the built-in `pocket`")
        return TargetError(what, next_step=next_step)
    if "custom code" in str(error):
        return TargetError(
            f"{name} needs modelling code from its own repository, and deepspec does not run such code",
            where=path,
            next_step="use a checkpoint of a family that transformers itself supports (docs/targets.md)",
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
        next_step="check that the directory holds config.json and all weights of one Hugging Face decoder",
    )


def check_whole(name: str, path: str, missing: Collection[str]) -> None:
    """Raise TargetError if the files lack weights, which transformers then fills with random numbers."""
    if missing:
        some = ", ".join(sorted(missing)[:3]) + (" …" if len(missing) > 3 else "")
        raise TargetError(
            f"{name} lacks {len(missing)} of the tensors that its config describes: {some}",
            where=path,
            next_step="copy or download all of its files again, from one model",
        )
