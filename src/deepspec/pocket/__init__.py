"""The embedded target, its drafts and its prompts: a real language model small enough to ship."""

from __future__ import annotations

from pathlib import Path

from deepspec.errors import UserError

DATA = Path(__file__).parent / "data"
DRAFTS = ("pocket-eagle3", "pocket-dflash", "pocket-dspark", "pocket-eagle3-portable")


def packaged(name: str) -> str:
    """The directory of a model that ships with the package; any other name as it is."""
    return str(DATA / name) if name in ("pocket", *DRAFTS) else name


PROMPTS = {f"pocket:{name}": DATA / "prompts" / f"{name}.jsonl" for name in ("train", "select", "test")}
"""The packaged prompts by the names that recipes and options use."""
TRAINED_ON = ("pocket:train", "pocket:select")
"""The packaged sets that training may use; results are reported on the other one."""


def prompts_path(name: str) -> Path:
    """The file behind a data path: a packaged set such as `pocket:test`, or the path as it is.

    Raises UserError for an unknown packaged set.
    """
    if not name.startswith("pocket:"):
        return Path(name)
    if name not in PROMPTS:
        raise UserError(f"no packaged prompts {name!r}", next_step=f"choose one of {', '.join(PROMPTS)}")
    return PROMPTS[name]
