"""The training recipe: one typed tree that refuses what it does not know.

A recipe is a YAML file. `extends: other` takes another recipe (by shipped name, or by a path relative to
the file) as the base: mappings are merged key by key, anything else is replaced. A list of bases is laid one
over the other in its order. `load_recipe` resolves a
name or a path, applies `key.path=value` overrides and checks the result; `dump_recipe` writes the resolved
tree, which loads back to the same recipe.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from deepspec.drafts import ALGORITHMS, MARKOV_HEADS
from deepspec.errors import RecipeError, nearest
from deepspec.files import write_text
from deepspec.log import TrackerName
from deepspec.pocket import TRAINED_ON

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


KEPT_CHECKPOINTS = 2
"""Latest checkpoints that a run keeps, besides the best one."""
HELD_OUT_ROWS = 16
"""Prompts that a held-out evaluation decodes together."""

FEATURE_SOURCES = ("online", "cache", "vllm", "sglang")


def feature_source(text: str) -> tuple[str, str]:
    """A recipe's `data.features` as (form, directory or URL).

    `online`, `cache:DIR`, `vllm:URL` or `sglang:URL`. Raises ValueError where it is none of them.
    """
    form, _, place = text.partition(":")
    known = text == "online" or (form in FEATURE_SOURCES[1:] and bool(place))
    if known and form in ("vllm", "sglang"):
        known = place.startswith(("http://", "https://"))
    if not known:
        raise ValueError(
            f"{text!r} is no feature source: write online, cache:DIRECTORY, vllm:http://HOST:PORT or "
            "sglang:http://HOST:PORT"
        )
    return form, place


def _known(names: Mapping[str, object]) -> Callable[[str], str]:
    """A check that a value is one of some names."""

    def check(value: str) -> str:
        if value not in names:
            close = nearest(value, names)
            hint = f"; did you mean {close!r}?" if close else ""
            raise ValueError(f"{value!r} is not one of {', '.join(names)}{hint}")
        return value

    return check


class Section(BaseModel):
    """One mapping of the tree: unknown keys are errors, values do not change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DraftConfig(Section):
    """The draft's shape. Widths, heads and vocabulary are the target's."""

    num_layers: Count
    block: Count  # γ, tokens proposed per round; for eagle3 the unroll length K
    target_layer_ids: list[Annotated[int, Field(ge=-1)]] | None = (
        None  # None: by rule from the target's depth
    )
    mask_token_id: Annotated[int, Field(ge=0)] | None = None  # None: the target family's
    markov_rank: Annotated[int, Field(ge=0)] = 0  # r; 0 means no sequential head
    markov_head: Annotated[str, AfterValidator(_known(MARKOV_HEADS))] = "vanilla"
    confidence: bool = False
    confidence_with_markov: bool = False  # the confidence head sees W₁[previous token] beside the hidden row
    intermediate_size: Count | None = None  # None: the target's
    vocab_size: Count | None = None  # ids the draft can propose: the data's most frequent; None: all
    qk_norm: bool = True  # per-head norms of queries and keys; SGLang's and llama.cpp's Eagle-3 has none
    init: Literal["random", "target"] = "random"  # first weights: drawn, or the target's last layers'
    step_loss_decay: Annotated[float, Field(gt=0, le=1)] = 0.8  # eagle3: unroll step s weighs decay^s


class LossConfig(Section):
    """Weights of the loss terms; eagle3's `ce` weighs its soft cross-entropy."""

    ce: NotNegative = 1.0
    l1: NotNegative = 0.0
    confidence: NotNegative = 0.0
    decay_gamma: Positive = 4.0  # g in exp(−(k−1)/g), the weight of block position k


class DataConfig(Section):
    """Where conversations come from: a JSONL path, or a set that ships with the pocket target."""

    train: str = "pocket:train"
    select: str = (
        "pocket:select"  # held-out prompts that choose the best checkpoint; neither trained nor reported
    )
    features: str = "online"  # or cache:DIR, vllm:URL, sglang:URL: where the target's features come from
    max_length: Count = 512  # tokens per sequence, longer ones are cut
    min_supervised: Count = 2  # sequences with fewer supervised tokens are left out; an anchor needs two


class OptimConfig(Section):
    """AdamW, linear warm-up, cosine decay. Training ends at whichever of the three limits comes first."""

    lr: Positive = 6e-4
    warmup: Share = 0.04  # share of the whole run
    weight_decay: NotNegative = 0.0
    betas: tuple[Share, Share] = (0.9, 0.95)
    grad_clip: Positive = 1.0  # global gradient norm
    states: Literal["float32", "8bit"] = "float32"  # AdamW's moments; 8bit needs bitsandbytes
    batch_size: Count = 16  # sequences per step, over all ranks
    micro_batch_size: Count | None = None  # of them, how many at a time; None: all. Memory, not the result
    epochs: Positive | None = None
    max_steps: Count | None = None
    max_minutes: Positive | None = None  # wall-clock budget


class Recipe(Section):
    """Everything that decides a training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # also the folder under runs/
    algorithm: Annotated[str, AfterValidator(_known(ALGORITHMS))]
    target: str = "pocket"  # shipped name, path, or hub id
    thinking: bool = False
    start_from: str | None = None  # a draft to fine-tune (`deepspec train --from`); None: fresh weights
    draft: DraftConfig
    loss: LossConfig = LossConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig
    num_anchors: Count = 32  # blocks per sequence and step; eagle3 trains on every position instead
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: Annotated[int, Field(ge=0)] = 0
    eval_every_steps: Count = 100
    eval_prompts: Count = 24
    eval_max_new_tokens: Count = 48
    checkpoint_every_steps: Count = 100
    trackers: list[TrackerName] = ["tensorboard"]

    def total_steps(self, rows: int) -> int | None:
        """Optimiser steps after which training on so many rows ends; None if only its time is limited."""
        limits = [] if self.optim.max_steps is None else [self.optim.max_steps]
        if self.optim.epochs is not None:
            limits.append(math.ceil(self.optim.epochs * self.steps_per_epoch(rows)))
        return min(limits, default=None)

    def steps_per_epoch(self, rows: int) -> int:
        """Optimiser steps over all rows; the last one may hold fewer sequences."""
        return max(math.ceil(rows / self.optim.batch_size), 1)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        problems = [*_draft_problems(self), *_run_problems(self)]
        if problems:
            raise ValueError("\n".join(problems))
        return self


# ---- what must hold between keys ---------------------------------------------------------------------------


def _draft_problems(recipe: Recipe) -> Iterator[str]:
    draft, loss, row = recipe.draft, recipe.loss, ALGORITHMS[recipe.algorithm]
    ids = draft.target_layer_ids
    if ids is not None and (not ids or any(a >= b for a, b in pairwise(ids))):
        yield f"`draft.target_layer_ids` must name layers in strictly increasing order, not {ids}"
    name, with_heads = recipe.algorithm, ", ".join(n for n, other in ALGORITHMS.items() if other.heads)
    if not row.heads and draft.markov_rank:
        yield f"`draft.markov_rank` must be 0 for {name}; the algorithm with that head is {with_heads}"
    if not row.heads and draft.confidence:
        yield f"`draft.confidence` must be false for {name}; the algorithm with that head is {with_heads}"
    if row.heads and not (draft.markov_rank or draft.confidence):
        yield f"{name} needs `draft.markov_rank` or `draft.confidence`; without both it is dflash"
    if row.layers not in (None, draft.num_layers):
        yield f"`draft.num_layers` must be {row.layers} for {name}, not {draft.num_layers}"
    if loss.l1 and not row.l1:
        yield f"`loss.l1` must be 0 for {name}: its loss has no such term"
    if draft.confidence_with_markov and not (draft.confidence and draft.markov_rank):
        yield "`draft.confidence_with_markov` needs `draft.confidence` and a `draft.markov_rank` above 0"
    if draft.confidence != (loss.confidence > 0):
        yield (
            "`draft.confidence` and `loss.confidence` go together: a confidence head is trained by its loss "
            "and by nothing else"
        )
    if not (loss.ce or loss.l1):
        yield "`loss.ce` and `loss.l1` are both 0: nothing would teach the draft its tokens"


def _run_problems(recipe: Recipe) -> Iterator[str]:
    optim, data = recipe.optim, recipe.data
    if not recipe.target:
        yield "`target` is not set: add target=DIRECTORY, a Hub id, or pocket"
    if optim.epochs is None and optim.max_steps is None and optim.max_minutes is None:
        yield "training has no end: set one of `optim.epochs`, `optim.max_steps`, `optim.max_minutes`"
    for key, source in (("train", data.train), ("select", data.select)):
        if source.startswith("pocket:") and source not in TRAINED_ON:
            yield f"`data.{key}` is {source!r}; the packaged sets for it are {', '.join(TRAINED_ON)}"
    try:
        feature_source(data.features)
    except ValueError as error:
        yield f"`data.features`: {error}"
    if data.train == data.select:
        yield f"`data.train` and `data.select` are both {data.train!r}: what chooses must not be trained on"
    if data.min_supervised > data.max_length:
        yield f"`data.min_supervised` ({data.min_supervised}) is above `data.max_length` ({data.max_length})"
    if len(set(recipe.trackers)) != len(recipe.trackers):
        yield f"`trackers` names one twice: {', '.join(recipe.trackers)}"


# ---- reading YAML ------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, except that a key given twice is an error instead of the last one winning."""

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


def _shipped() -> dict[str, Traversable]:
    """Every recipe file of the package by name, such as `pocket-dspark` or `dspark/qwen3-4b`."""
    folder = resources.files("deepspec").joinpath("recipes")
    found: dict[str, Traversable] = {}
    for entry in folder.iterdir():
        inside = {f"{entry.name}/{file.name}": file for file in entry.iterdir()} if entry.is_dir() else None
        found |= inside if inside is not None else {entry.name: entry}
    return {name.removesuffix(".yaml"): file for name, file in found.items() if name.endswith(".yaml")}


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package; those with a leading underscore are bases only."""
    return sorted(name for name in _shipped() if not name.split("/")[-1].startswith("_"))


def _find(name_or_path: str, beside: Path | None) -> tuple[str, Path | Traversable]:
    """(label for messages, file) of a recipe given as a shipped name or as a path; the name wins."""
    shipped = _shipped()
    if name_or_path in shipped:
        return f"{name_or_path} (shipped recipe)", shipped[name_or_path]
    close = nearest(name_or_path, recipe_names())
    hint = f"did you mean {close}? " if close else ""
    path = Path(name_or_path).expanduser()
    if beside is not None and not path.is_absolute():
        path = beside / path
    looks_like_path = path.suffix in (".yaml", ".yml") or any(sep in name_or_path for sep in ("/", os.sep))
    if looks_like_path:
        if not path.is_file():
            raise RecipeError(
                f"there is no recipe file {path}",
                next_step=f"{hint}Give a path that exists, or a shipped recipe: {', '.join(recipe_names())}",
            )
        return str(path), path
    raise RecipeError(
        f"there is no recipe named {name_or_path!r}",
        next_step=f"{hint}Shipped recipes: {', '.join(recipe_names())}; or give the path of a .yaml file",
    )


# ---- merging, with the origin of every value ---------------------------------------------------------------

Keys = tuple[str | int, ...]


def _merge(
    tree: dict[str, Any], new: Mapping[str, Any], origins: dict[Keys, str], label: str, at: Keys
) -> None:
    """Lay `new` over `tree` in place, and note `label` as the origin of each value that it sets."""
    for key, value in new.items():
        here = (*at, key)
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value, origins, label, here)
            continue
        for below in [path for path in origins if path[: len(here)] == here]:
            del origins[below]
        origins[here] = label
        tree[key] = {} if isinstance(value, dict) else value
        if isinstance(value, dict):
            _merge(tree[key], value, origins, label, here)


def _lay(
    name_or_path: str,
    beside: Path | None,
    tree: dict[str, Any],
    origins: dict[Keys, str],
    seen: tuple[str, ...] = (),
) -> None:
    """Lay a recipe file over `tree` in place, after everything that it extends."""
    label, file = _find(name_or_path, beside)
    if label in seen:
        raise RecipeError("recipes extend each other in a circle: " + " → ".join([*seen, label]))
    try:
        content = _parse(file.read_text(encoding="utf-8"), label)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe cannot be read: {error}", where=label) from error
    if not isinstance(content, dict):
        raise RecipeError("a recipe is a mapping of keys to values", where=label)
    given = content.pop("extends", None)
    bases = given if isinstance(given, list) else [] if given is None else [given]
    if not all(isinstance(base, str) for base in bases):
        raise RecipeError(f"`extends` takes names or paths of recipes, not {given!r}", where=label)
    for base in bases:
        try:
            folder = file.parent if isinstance(file, Path) else None
            _lay(base, folder, tree, origins, (*seen, label))
        except RecipeError as error:
            if error.where is None:
                error.where = f"`extends` in {label}"
            raise
    _merge(tree, content, origins, label, ())


def _override(text: str) -> dict[str, Any]:
    """ "optim.lr=1e-3" -> {"optim": {"lr": "1e-3"}}; the value is read as YAML."""
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(
            f"not an override: {text!r}", next_step="write key.path=value, for example optim.lr=1e-3"
        )
    tree: Any = _parse(value, f"override {text}")
    for key in reversed(keys):
        tree = {key: tree}
    return dict(tree)


# ---- saying what is wrong ----------------------------------------------------------------------------------


def _sections(model: type[BaseModel], at: str = "") -> Iterator[tuple[str, list[str]]]:
    """(dotted prefix, keys) of every mapping in the tree."""
    yield at, list(model.model_fields)
    for key, field in model.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _sections(kind, f"{at}{key}.")


def _nearest_key(keys: Keys) -> str | None:
    """The known key path most like an unknown one.

    The same name elsewhere in the tree comes first (`lr` at the top is `optim.lr`), then a like name in the
    same mapping, then a like name anywhere.
    """
    *parents, last = (str(key) for key in keys)
    prefix = "".join(f"{key}." for key in parents)
    sections = dict(_sections(Recipe))
    homes = {name: f"{at}{name}" for at, names in reversed(sections.items()) for name in names}
    if last in homes:
        return homes[last]
    sibling = nearest(last, sections.get(prefix, []))
    if sibling:
        return prefix + sibling
    anywhere = nearest(last, homes)
    return homes[anywhere] if anywhere else None


def _dotted(keys: Keys) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")


def _explain(error: ErrorDetails) -> str:
    """One pydantic error as one line that names the key path."""
    keys = error["loc"]
    if error["type"] == "extra_forbidden":
        close = _nearest_key(keys)
        return f"unknown key `{_dotted(keys)}`" + (f"; did you mean `{close}`?" if close else "")
    if error["type"] == "missing":
        return f"`{_dotted(keys)}` is missing"
    if error["type"] == "value_error":  # a message of ours; one about the whole recipe names its keys itself
        return f"`{_dotted(keys)}`: {error['ctx']['error']}" if keys else str(error["ctx"]["error"])
    if error["type"] == "model_type":
        return f"`{_dotted(keys)}` is {error['input']!r}: a mapping of keys is expected here"
    message = error["msg"][0].lower() + error["msg"][1:]
    line = f"`{_dotted(keys)}` is {error['input']!r}: {message}"
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        close = nearest(
            error["input"], error["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        )
        line += f"; did you mean {close!r}?" if close else ""
    return line


def _where(keys: Iterable[Keys], origins: Mapping[Keys, str], default: str) -> str:
    """The files and overrides that the keys at fault were set in."""
    found: dict[str, None] = {}
    for path in keys:
        lengths = range(len(path), 0, -1)
        found[next((origins[path[:n]] for n in lengths if path[:n] in origins), default)] = None
    return ", ".join(found)


# ---- the two verbs -----------------------------------------------------------------------------------------


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that shipped name or path, with `key.path=value` overrides laid over it.

    Raises RecipeError, naming the file or override, the key path and the nearest known key, for anything
    that is not a recipe: a missing file, broken YAML, an unknown key, a value out of range, keys at odds.
    """
    label, _ = _find(str(name_or_path), None)
    tree: dict[str, Any] = {}
    origins: dict[Keys, str] = {}
    _lay(str(name_or_path), None, tree, origins)
    for text in overrides:
        _merge(tree, _override(text), origins, f"override {text}", ())
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        details = error.errors(include_url=False)
        overridden = [origin for origin in dict.fromkeys(origins.values()) if origin.startswith("override ")]
        default = ", ".join([label, *overridden])  # keys at odds may have been set anywhere
        raise RecipeError(
            "\n".join(_explain(detail) for detail in details),
            # What is missing was set nowhere; an origin further up would only name the wrong file.
            where=_where(
                (() if detail["type"] == "missing" else detail["loc"] for detail in details), origins, default
            ),
        ) from error


def dump_recipe(recipe: Recipe, path: Path | str) -> None:
    """Write the resolved recipe as YAML, whole or not at all; `load_recipe(path)` gives the same recipe."""
    write_text(
        Path(path), yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    )
