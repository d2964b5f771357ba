"""The draft algorithms, one row each: everything about an algorithm that other rooms need to know.

A new algorithm is one file in this folder, one row in `ALGORITHMS`, and its recipes. Recipes, training, the
planner, reports, checkpoints and exports ask the row; none of them knows an algorithm by name. Torch is not
imported here: a class is loaded when a draft is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field

from deepspec.maths.terms import TERMS

if TYPE_CHECKING:
    from deepspec.drafts.base import NeuralDraft
    from deepspec.drafts.spec import DraftSpec


Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LossSettings(BaseModel, extra="forbid", frozen=True):
    """A recipe's `loss`: weights of the terms (`maths.terms`) by their names, the weight of the confidence
    head's loss, and how the positions of a block are weighted. For a draft that learns no labels
    (`Algorithm.labels`), `ce` is the cross-entropy with the target's distribution: its `kl`."""

    ce: Weight = 1.0
    l1: Weight = 0.0
    kl: Weight = 0.0
    reverse_kl: Weight = 0.0
    lk_alpha: Weight = 0.0
    lk_lambda: Weight = 0.0
    confidence: Weight = 0.0
    positions: Literal["decay", "survival", "dpace"] = "decay"
    """decay: fixed weights; the others follow the draft (`maths.positions.RULES`)."""
    decay_gamma: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4.0
    """g in exp(−(k−1)/g), the weight of block position k."""

    def terms(self, labels: bool = True) -> dict[str, float]:
        """term -> its weight, unless that is zero. labels: whether the draft learns labels."""
        found = {name: weight for name in TERMS if (weight := getattr(self, name))}
        if not labels and "ce" in found:
            found["kl"] = found.pop("ce")
        return found


def reads_of_a_block(loss: LossSettings) -> tuple[str, ...]:
    """What the loss of a block draft reads: features before its anchors and, if a weighted term needs the
    teacher, the target's distribution."""
    taught = loss.confidence or loss.positions == "survival"
    taught = taught or any(TERMS[name].teacher for name in loss.terms())
    return ("context", "labels") if taught else ("context",)


def has_heads(config: Mapping[str, Any]) -> bool:
    """Whether a block draft's config describes a sequential or a confidence head."""
    return bool(config.get("markov_rank") or config.get("enable_confidence_head"))


@dataclass(frozen=True)
class Algorithm:
    """What other rooms know about a draft algorithm.

    title: its name in text; marker and dashes: how charts draw it.
    draft: "module:Class" of its `NeuralDraft`.
    architectures: the `architectures` entry of its config.json, by draft family.
    claims: whether a config with one of these architectures describes this algorithm.
    parallel: a block of γ slots is filled in one pass from mask tokens, and trained at sampled anchors. If it
    is False, γ tokens are unrolled one after another (Eagle-3), and every position is trained.
    reads: a function from the loss weights to the names (`maths.blocks.READ_RULES`) of what the loss reads
    from the target.
    served: a function from a spec to what servers call the draft (a key of `checkpoints.servers.SERVED_AS`).
    heads: whether it has a sequential or a confidence head. layers: the only depth it can have, or None.
    labels: whether it learns the tokens of the data; if not, the target's distribution alone.
    aliases: names of architectures that other trainers write, with the draft family of each.
    """

    title: str
    marker: str
    dashes: str
    draft: str
    architectures: Mapping[str, str]
    parallel: bool
    reads: Callable[[LossSettings], tuple[str, ...]]
    served: Callable[[DraftSpec], str]
    claims: Callable[[Mapping[str, Any]], bool] = lambda config: True
    heads: bool = False
    layers: int | None = None
    labels: bool = True
    aliases: Mapping[str, str] | None = None

    @property
    def needs_mask(self) -> bool:
        """Whether a mask token is needed, which stands for "not known yet"."""
        return self.parallel

    def passes(self, block: int) -> int:
        """The number of forward passes for one proposal of `block` slots."""
        return 1 if self.parallel else block

    def build(self, spec: DraftSpec) -> NeuralDraft:
        """A draft with new weights, not yet bound to a target."""
        draft: NeuralDraft = resolve_name(self.draft)(spec)
        return draft


_BLOCK = {"qwen3": "Qwen3DSparkModel", "gemma4": "Gemma4DSparkModel"}

ALGORITHMS: dict[str, Algorithm] = {
    "eagle3": Algorithm(
        title="Eagle-3",
        marker="square",
        dashes="7 4",
        draft="deepspec.drafts.eagle3:Eagle3Draft",
        architectures={"qwen3": "Qwen3Eagle3Model", "gemma4": "Gemma4Eagle3Model"},
        aliases={"Eagle3DraftModel": "qwen3"},
        parallel=False,
        reads=lambda loss: ("unroll",),
        served=lambda spec: "eagle3, q/k norms" if spec.shape.qk_norm else "eagle3",
        layers=1,
        labels=False,
    ),
    "dflash": Algorithm(
        title="DFlash",
        marker="diamond",
        dashes="2 3",
        draft="deepspec.drafts.dflash:DFlashDraft",
        architectures=_BLOCK,
        claims=lambda config: not has_heads(config),
        parallel=True,
        reads=reads_of_a_block,
        # Servers know DFlash by its older alignment only. A DFlash draft that samples from its anchor is, to
        # them, a DSpark draft whose heads add nothing.
        served=lambda spec: "dspark" if spec.sample_from_anchor else "dflash, fill-in",
    ),
    "dspark": Algorithm(
        title="DSpark",
        marker="circle",
        dashes="",
        draft="deepspec.drafts.dspark:DSparkDraft",
        architectures=_BLOCK,
        claims=has_heads,
        parallel=True,
        reads=reads_of_a_block,
        served=lambda spec: "dspark",
        heads=True,
    ),
}
"""The algorithms, by the name that recipes use."""

MARKOV_HEADS: dict[str, str] = {
    "vanilla": "deepspec.drafts.heads:MarkovHead",
    "gated": "deepspec.drafts.heads:GatedMarkovHead",
    "rnn": "deepspec.drafts.heads:RecurrentMarkovHead",
}
"""Sequential heads of block drafts, as "module:Class"."""


def algorithm_of(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """(algorithm, draft family) of a config in the released layout, or None if it is not a draft's config."""
    architecture = (config.get("architectures") or [None])[0]
    for name, row in ALGORITHMS.items():
        families = {known: family for family, known in row.architectures.items()} | dict(row.aliases or {})
        if architecture in families and row.claims(config):
            return name, families[architecture]
    return None
