"""The training recipe: one typed tree that refuses keys and values it does not know.

A recipe is a YAML file. `extends: other` makes another recipe its base (by shipped name, or by a path
relative to the file): mappings are merged key by key, and anything else is replaced. Several bases are laid
one over the other in the order of their list. `load_recipe` resolves a name or a path, applies
`key.path=value` overrides and checks the result; `dump_recipe` writes the resolved tree, which loads back to
the same recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.functional_serializers import PlainSerializer
from pydantic_core import ErrorDetails

from deepspec.drafts import ALGORITHMS, MARKOV_HEADS, LossSettings
from deepspec.errors import RecipeError, nearest, without_logins
from deepspec.files import write_text
from deepspec.log import TrackerName
from deepspec.maths.terms import TERMS
from deepspec.pocket import TRAINED_ON
from deepspec.recipe_files import Keys, lay_recipe, merge, parse_override

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


KEPT_CHECKPOINTS = 2
"""The number of latest checkpoints that a run keeps, besides the best one."""
LOG_EVERY = 10
"""Optimiser steps from one line of metrics to the next; only these steps compute the metrics."""
HELD_OUT_ROWS = 16
"""The number of prompts that a held-out evaluation decodes together."""


def feature_source(text: str) -> tuple[str, str]:
    """A recipe's `data.features` as (kind, directory or URL).

    `online`, `cache:DIR` or `vllm:URL`. Raises ValueError if it is none of them.
    """
    kind, _, place = text.partition(":")
    if kind == "sglang":
        raise ValueError(
            "SGLang is no longer a feature source: its features are not enough for most drafts. Write "
            "vllm:http://HOST:PORT for a vLLM server, cache:DIRECTORY for a cache that `deepspec data cache` "
            "wrote, or online to compute features in the step"
        )
    url = place.startswith(("http://", "https://"))
    if not (text == "online" or (kind == "cache" and place) or (kind == "vllm" and url)):
        raise ValueError(
            f"{text!r} is not a feature source: write online, cache:DIRECTORY or vllm:http://HOST:PORT"
        )
    return kind, place


def _known(names: Mapping[str, object]) -> Callable[[str], str]:
    """A validator that accepts only the given names."""

    def check(value: str) -> str:
        if value not in names:
            close = nearest(value, names)
            hint = f"; did you mean {close!r}?" if close else ""
            raise ValueError(f"{value!r} is not one of {', '.join(names)}{hint}")
        return value

    return check


class Section(BaseModel):
    """One mapping of the tree. Unknown keys are errors, and values cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DraftConfig(Section):
    """The draft's shape. Widths, heads and vocabulary are taken from the target."""

    num_layers: Count
    block: Count  # γ, the tokens proposed per round; for eagle3 the unroll length K
    # None: a rule chooses `feature_layers` of them from the target's depth
    target_layer_ids: list[Annotated[int, Field(ge=-1)]] | None = None
    feature_layers: Count = 5
    mask_token_id: Annotated[int, Field(ge=0)] | None = None  # None: a token that the target never writes
    markov_rank: Annotated[int, Field(ge=0)] = 0  # r; 0 means no sequential head
    markov_head: Annotated[str, AfterValidator(_known(MARKOV_HEADS))] = "vanilla"
    confidence: bool = False
    confidence_with_markov: bool = False  # the confidence head also sees W₁[previous token]
    intermediate_size: Count | None = None  # None: the target's
    vocab_size: Count | None = None  # the draft proposes only this many, most frequent, ids; None: all
    qk_norm: bool = True  # per-head norms of queries and keys; SGLang and llama.cpp want none in Eagle-3
    init: Literal["random", "target"] = "random"  # first weights; target: those of its last layers
    step_loss_decay: Annotated[float, Field(gt=0, le=1)] = 0.8  # eagle3: unroll step s has weight decay^s


class DataConfig(Section):
    """Where conversations come from: a JSONL file, or a set that ships with the pocket target."""

    train: str = "pocket:train"
    select: str = "pocket:select"  # held-out prompts, only to choose the best checkpoint
    # or cache:DIR, vllm:URL: where the target's features come from; written without a URL's user and password
    features: Annotated[str, PlainSerializer(without_logins, when_used="json")] = "online"
    max_length: Count = 512  # tokens per sequence; longer sequences are cut
    skip_bad: bool = False  # leave out rows that cannot be used, and count them, instead of stopping at one
    min_supervised: Count = 2  # sequences with fewer supervised tokens are left out; an anchor needs two


class OptimConfig(Section):
    """AdamW with linear warm-up and cosine decay. Training ends at the first limit that it reaches."""

    lr: Positive = 6e-4
    warmup: Share = 0.04  # share of the whole run
    weight_decay: NotNegative = 0.0
    betas: tuple[Share, Share] = (0.9, 0.95)
    grad_clip: Positive = 1.0  # largest global gradient norm
    states: Literal["float32", "8bit"] = "float32"  # AdamW's moments; 8bit needs bitsandbytes
    matrices: Literal["adamw", "muon"] = "adamw"  # what steps the matrices between layers
    batch_size: Count = 16  # sequences per step, of all ranks together
    micro_batch_size: Count | None = None  # sequences at a time, to save memory; None: any number
    micro_batch_tokens: Count | None = None  # tokens at a time, padding included; None: any number
    epochs: Positive | None = None
    max_steps: Count | None = None
    max_minutes: Positive | None = None  # wall-clock budget
    skip_steps: Annotated[int, Field(ge=0)] = 0  # steps with infinities, NaN or a loss that explodes to skip


class Recipe(Section):
    """Everything that decides a training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]  # also the folder under runs/
    algorithm: Annotated[str, AfterValidator(_known(ALGORITHMS))]
    target: str = "pocket"  # built-in name, path, or Hub id
    thinking: bool = False
    start_from: str | None = None  # a draft to fine-tune (`deepspec train --from`); None: new weights
    draft: DraftConfig
    loss: LossSettings = LossSettings()
    data: DataConfig = DataConfig()
    optim: OptimConfig
    num_anchors: Count = 32  # blocks per sequence and step; eagle3 trains on every position instead
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: Annotated[int, Field(ge=0)] = 0
    compile: bool | None = None  # fuse passes over memory by torch.compile; None: on a GPU with Triton
    shard_target: bool = False  # split the target's layers over the processes of torchrun
    shard_draft: bool = False  # split the draft's weights, gradients and moments over them
    offload_optimizer: bool = False  # a GPU's draft: float32 masters and moments in the host's memory
    eval_every_steps: Count = 100
    eval_prompts: Count = 24
    eval_max_new_tokens: Count = 48
    early_stop: Count | None = None  # stop after so many evaluations in a row without a better τ
    checkpoint_every_steps: Count = 100
    trackers: list[TrackerName] = ["tensorboard"]

    @property
    def splits(self) -> bool:
        """Whether a model is split over the processes, which then must pass it equally often."""
        return self.shard_target or self.shard_draft

    def total_steps(self, rows: int) -> int | None:
        """The number of optimiser steps over `rows` training rows; None if only the time is limited."""
        limits = [] if self.optim.max_steps is None else [self.optim.max_steps]
        if self.optim.epochs is not None:
            limits.append(math.ceil(self.optim.epochs * self.steps_per_epoch(rows)))
        return min(limits, default=None)

    def steps_per_epoch(self, rows: int) -> int:
        """The number of optimiser steps that pass all rows once; the last step may have fewer sequences."""
        return max(math.ceil(rows / self.optim.batch_size), 1)

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        problems = [*_draft_problems(self), *_run_problems(self)]
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _draft_problems(recipe: Recipe) -> Iterator[str]:
    draft, loss, row = recipe.draft, recipe.loss, ALGORITHMS[recipe.algorithm]
    ids = draft.target_layer_ids
    if ids is not None and (not ids or any(a >= b for a, b in pairwise(ids))):
        yield f"`draft.target_layer_ids` must list layers in strictly increasing order, not {ids}"
    name, with_heads = recipe.algorithm, ", ".join(n for n, other in ALGORITHMS.items() if other.heads)
    if not row.heads and draft.markov_rank:
        yield f"`draft.markov_rank` must be 0 for {name}; only {with_heads} has a sequential head"
    if not row.heads and draft.confidence:
        yield f"`draft.confidence` must be false for {name}; only {with_heads} has a confidence head"
    if row.heads and not (draft.markov_rank or draft.confidence):
        yield f"{name} needs `draft.markov_rank` above 0 or `draft.confidence`; without both it is dflash"
    if row.layers not in (None, draft.num_layers):
        yield f"`draft.num_layers` must be {row.layers} for {name}, not {draft.num_layers}"
    if not row.labels and loss.ce and loss.kl:
        yield f"set one of `loss.ce` and `loss.kl` for {name}: both are its cross-entropy with the target"
    if not row.labels and loss.positions == "dpace":
        yield f"`loss.positions` cannot be dpace for {name}: it needs the probability of a label"
    if draft.confidence_with_markov and not (draft.confidence and draft.markov_rank):
        yield "`draft.confidence_with_markov` needs `draft.confidence` and a `draft.markov_rank` above 0"
    if draft.confidence != (loss.confidence > 0):
        yield (
            "`draft.confidence` and `loss.confidence` go together: set both or neither, because only that "
            "loss trains a confidence head"
        )
    if not loss.terms():
        terms = ", ".join(f"`loss.{term}`" for term in TERMS)
        yield f"{terms} are all 0, so the draft would learn no tokens"


def _run_problems(recipe: Recipe) -> Iterator[str]:
    optim, data = recipe.optim, recipe.data
    if not recipe.target:
        yield "`target` is not set: add target=DIRECTORY, a Hub id, or pocket"
    plain = optim.matrices == "adamw" and optim.states == "float32"
    if recipe.shard_draft and not plain:
        yield (
            "`shard_draft` needs `optim.matrices=adamw` and `optim.states=float32`: Muon and 8-bit moments "
            "step whole matrices"
        )
    if recipe.offload_optimizer and not plain:
        yield (
            "`offload_optimizer` needs `optim.matrices=adamw` and `optim.states=float32`: a processor takes "
            "far longer for Muon's products, and 8-bit moments save none of the GPU's memory there; or set "
            "offload_optimizer=false"
        )
    if recipe.offload_optimizer and recipe.shard_draft:
        yield "set one of `offload_optimizer` and `shard_draft`: masters are on the host, or split over GPUs"
    if optim.epochs is None and optim.max_steps is None and optim.max_minutes is None:
        yield "training has no end: set one of `optim.epochs`, `optim.max_steps`, `optim.max_minutes`"
    for key, source in (("train", data.train), ("select", data.select)):
        if source.startswith("pocket:") and source not in TRAINED_ON:
            yield f"`data.{key}` is {source!r}, but it must be a file or one of {', '.join(TRAINED_ON)}"
    try:
        feature_source(data.features)
    except ValueError as error:
        yield f"`data.features`: {error}"
    if data.train == data.select:
        yield (
            f"`data.train` and `data.select` are both {data.train!r}: the prompts that choose the best "
            "checkpoint must not be trained on"
        )
    if data.min_supervised > data.max_length:
        yield f"`data.min_supervised` ({data.min_supervised}) is above `data.max_length` ({data.max_length})"
    if len(set(recipe.trackers)) != len(recipe.trackers):
        yield f"`trackers` contains the same name twice: {', '.join(recipe.trackers)}"


def _sections(model: type[BaseModel], at: str = "") -> Iterator[tuple[str, list[str]]]:
    """(dotted prefix, its keys) for every mapping in the tree."""
    yield at, list(model.model_fields)
    for key, field in model.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _sections(kind, f"{at}{key}.")


def _nearest_key(keys: Keys) -> str | None:
    """The known key path that is most like an unknown one.

    The same name elsewhere in the tree comes first (`lr` at the top is `optim.lr`), then a similar name in
    the same mapping, then a similar name anywhere.
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
    """One pydantic error as a line that names the key path."""
    keys = error["loc"]
    if error["type"] == "extra_forbidden":
        close = _nearest_key(keys)
        return f"unknown key `{_dotted(keys)}`" + (f"; did you mean `{close}`?" if close else "")
    if error["type"] == "missing":
        return f"`{_dotted(keys)}` is missing"
    if error["type"] == "value_error":  # our own message; if it is about the whole recipe, it names the keys
        return f"`{_dotted(keys)}`: {error['ctx']['error']}" if keys else str(error["ctx"]["error"])
    if error["type"] == "model_type":
        return f"`{_dotted(keys)}` is {error['input']!r}, but it must be a mapping of keys"
    message = error["msg"][0].lower() + error["msg"][1:]
    line = f"`{_dotted(keys)}` is {error['input']!r}: {message}"
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        close = nearest(
            error["input"], error["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        )
        line += f"; did you mean {close!r}?" if close else ""
    return line


def _where(keys: Iterable[Keys], origins: Mapping[Keys, str], default: str) -> str:
    """The files and overrides that set the keys at fault."""
    found: dict[str, None] = {}
    for path in keys:
        lengths = range(len(path), 0, -1)
        found[next((origins[path[:n]] for n in lengths if path[:n] in origins), default)] = None
    return ", ".join(found)


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe with a shipped name or path, after its `key.path=value` overrides.

    Raises RecipeError for a missing file, broken YAML, an unknown key, a value out of range, or keys that
    contradict each other. The error names the file or override, the key path and the nearest known key.
    """
    tree: dict[str, Any] = {}
    origins: dict[Keys, str] = {}
    label = lay_recipe(str(name_or_path), None, tree, origins)
    return _resolved(tree, origins, overrides, label)


def override(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """The recipe with `key.path=value` overrides laid over it. Raises RecipeError as `load_recipe` does."""
    return _resolved(recipe.model_dump(), {}, overrides, recipe.name)


def _resolved(tree: dict[str, Any], origins: dict[Keys, str], overrides: Sequence[str], label: str) -> Recipe:
    for text in overrides:
        merge(tree, parse_override(text), origins, f"override {text}", ())
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        details = error.errors(include_url=False)
        overridden = [origin for origin in dict.fromkeys(origins.values()) if origin.startswith("override ")]
        default = ", ".join([label, *overridden])  # contradicting keys may come from any of them
        raise RecipeError(
            "\n".join(_explain(detail) for detail in details),
            # No file set a missing key, and the origin of its parent would be the wrong file.
            where=_where(
                (() if detail["type"] == "missing" else detail["loc"] for detail in details), origins, default
            ),
        ) from error


def dump_recipe(recipe: Recipe, path: Path | str) -> None:
    """Write the resolved recipe as YAML, whole or not at all; `load_recipe(path)` gives the same recipe,
    without the passwords that its addresses hold."""
    write_text(
        Path(path), yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    )
