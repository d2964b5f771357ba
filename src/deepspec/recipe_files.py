"""Recipe files: they are found by name or path, parsed, and laid over the recipes that they extend.

This room knows how recipes are written, not which keys they have (`config.py`). It notes the origin of every
value, the file or override that set it, so that an error can name that origin.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from deepspec.errors import RecipeError, nearest

Keys = tuple[str | int, ...]
"""The path of a value in a recipe: keys, and indices of lists."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, except that a key which appears twice is an error; PyYAML keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key}` appears twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"not valid YAML: {error.problem}", where=f"{where}{line}") from error
    except (yaml.YAMLError, TypeError) as error:  # TypeError: a mapping used as a key
        raise RecipeError(f"not valid YAML: {error}", where=where) from error


def _shipped() -> dict[str, Path]:
    """Every recipe file of the package, by its name, such as `pocket-dspark` or `dspark/qwen3-4b`."""
    folder = Path(__file__).parent / "recipes"
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in folder.rglob("*.yaml")}


def recipe_names() -> list[str]:
    """The names of the recipes that ship with the package, without the bases (`_pocket`, …)."""
    return sorted(name for name in _shipped() if not name.split("/")[-1].startswith("_"))


def find_recipe(name_or_path: str, beside: Path | None) -> tuple[str, Path]:
    """(label for messages, file) of a recipe, given as a shipped name or as a path; a shipped name wins.

    beside: the folder that relative paths start from; None means the working directory. Raises RecipeError.
    """
    shipped = _shipped()
    if name_or_path in shipped:
        return f"{name_or_path} (shipped recipe)", shipped[name_or_path]
    close = nearest(name_or_path, recipe_names())
    choices = (f"did you mean {close}? " if close else "") + f"shipped recipes: {', '.join(recipe_names())}"
    path = (beside or Path()) / Path(name_or_path).expanduser()
    looks_like_path = path.suffix in (".yaml", ".yml") or any(sep in name_or_path for sep in ("/", os.sep))
    if looks_like_path:
        if not path.is_file():
            raise RecipeError(f"there is no recipe file {path}", next_step=choices)
        return str(path), path
    raise RecipeError(
        f"there is no recipe named {name_or_path!r}", next_step=f"{choices}; or give the path of a .yaml file"
    )


def merge(
    tree: dict[str, Any], new: Mapping[str, Any], origins: dict[Keys, str], label: str, at: Keys
) -> None:
    """Lay `new` over `tree` in place, and note `label` as the origin of each value that it sets. at: where
    `tree` is in the whole recipe."""
    for key, value in new.items():
        here = (*at, key)
        nested = isinstance(value, dict)
        if not (nested and isinstance(tree.get(key), dict)):
            for below in [path for path in origins if path[: len(here)] == here]:
                del origins[below]
            origins[here] = label
            tree[key] = {} if nested else value
        if nested:
            merge(tree[key], value, origins, label, here)


def lay_recipe(
    name_or_path: str,
    beside: Path | None,
    tree: dict[str, Any],
    origins: dict[Keys, str],
    seen: tuple[str, ...] = (),
) -> str:
    """Lay a recipe file over `tree` in place, after the recipes that it extends, and return its label.

    Raises RecipeError."""
    label, file = find_recipe(name_or_path, beside)
    if label in seen:
        raise RecipeError("recipes extend each other in a circle: " + " → ".join([*seen, label]))
    try:
        content = _parse(file.read_text(encoding="utf-8"), label)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe cannot be read: {error}", where=label) from error
    if not isinstance(content, dict):
        raise RecipeError("a recipe must be a mapping of keys to values", where=label)
    given = content.pop("extends", None)
    bases = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(base, str) for base in bases):
        raise RecipeError(f"`extends` takes names or paths of recipes, not {given!r}", where=label)
    for base in bases:
        try:
            lay_recipe(base, file.parent, tree, origins, (*seen, label))
        except RecipeError as error:
            if error.where is None:
                error.where = f"`extends` in {label}"
            raise
    merge(tree, content, origins, label, ())
    return label


def parse_override(text: str) -> dict[str, Any]:
    """ "optim.lr=1e-3" -> {"optim": {"lr": "1e-3"}}; the value is read as YAML. Raises RecipeError."""
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(
            f"{text!r} is not an override", next_step="write key.path=value, for example optim.lr=1e-3"
        )
    tree: Any = _parse(value, f"override {text}")
    for key in reversed(keys):
        tree = {key: tree}
    return dict(tree)
