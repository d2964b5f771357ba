"""From a recipe and a target to the draft that is trained: shape, mask token, vocabulary, first weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch

from deepspec.checkpoints.draft import load_draft, new_draft
from deepspec.config import Recipe
from deepspec.data.rows import frequent_ids, supervised_counts
from deepspec.data.tokens import Encoded
from deepspec.drafts import ALGORITHMS
from deepspec.drafts.base import NeuralDraft
from deepspec.drafts.layers import DraftLayer
from deepspec.drafts.spec import DraftSpec, SpecError, new_spec
from deepspec.errors import RecipeError
from deepspec.targets import Target

READ_INPUT = tuple(f"self_attn.{name}_proj.weight" for name in "qkv")


def recipe_spec(recipe: Recipe, target: Target) -> DraftSpec:
    """The recipe's draft for this target, its mask token chosen. Raises RecipeError."""
    needs_mask = ALGORITHMS[recipe.algorithm].needs_mask
    mask = mask_token(target, recipe.draft.mask_token_id) if needs_mask else None
    return draft_spec(recipe, target.spec.config, mask)


def build_draft(
    recipe: Recipe, target: Target, rows: Sequence[Encoded] = (), spec: DraftSpec | None = None
) -> NeuralDraft:
    """A draft as the recipe describes it: fresh, or with the weights of `start_from`.

    rows: a reduced vocabulary is counted in them (a draft that is fine-tuned keeps its own). spec: what
    `recipe_spec` gave, if it is known already. Raises RecipeError if the draft cannot fit the target, or has
    another shape than `start_from`.
    """
    spec = spec or recipe_spec(recipe, target)
    if recipe.start_from is None:
        size = spec.draft_vocab_size
        kept = size and frequent_ids(rows, size, target.stop_token_ids, spec.vocab_size)
        draft = new_draft(spec, target, seed=recipe.seed, kept=kept or None)
        if recipe.draft.init == "target":
            copy_last_layers(draft, target)
    else:
        draft = trained_draft(recipe.start_from, spec, target)
    return draft.to(torch.bfloat16) if recipe.precision == "bfloat16" else draft.float()


@torch.no_grad()
def copy_last_layers(draft: NeuralDraft, target: Target) -> None:
    """Start a draft as a copy of the target's end: its layers get the matrices of the target's last layers,
    which turn a late hidden state into one that the head reads, and its projection passes on the deepest
    feature layer.

    Norms keep their ones (families scale them differently). Eagle-3's attention reads twice the width; the
    half that reads its hidden state gets the target's matrices. Raises RecipeError if a matrix has no
    counterpart of its shape.
    """
    width = draft.spec.shape.hidden
    layers = [part for part in draft.modules() if isinstance(part, DraftLayer)]
    for layer, last in zip(layers, target.decoder.layers[-len(layers) :], strict=True):
        theirs = dict(last.named_parameters())
        for name, matrix in layer.named_parameters():
            if matrix.dim() < 2:
                continue
            place = matrix[:, -width:] if name in READ_INPUT else matrix
            found = theirs.get(name)
            if found is None or found.shape != place.shape:
                shape = "none" if found is None else list(found.shape)
                raise RecipeError(
                    f"draft.init=target: the draft's layers need a {name} of {list(place.shape)}, "
                    f"the last layers of {target.spec.name} have {shape}",
                    next_step="train it from drawn weights: draft.init=random",
                )
            # A target that is split over ranks gathers its weights here, on all of them.
            place.copy_(found.full_tensor() if hasattr(found, "full_tensor") else found)
    draft.fc.weight.zero_()
    draft.fc.weight[:, -width:].fill_diagonal_(1.0)


def vocabulary_facts(draft: NeuralDraft, rows: Sequence[Encoded]) -> dict[str, Any]:
    """The size of a reduced vocabulary, a hash of its ids, and the share of the data's tokens it covers."""
    kept = draft.head.kept
    if kept is None:
        return {}
    ids, counts = kept.tolist(), supervised_counts(rows, draft.spec.vocab_size)
    coverage = int(counts[ids].sum()) / max(int(counts.sum()), 1)
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    return {"vocabulary": {"ids": len(ids), "ids_hash": digest, "coverage": coverage}}


def draft_spec(recipe: Recipe, target_config: dict[str, Any], mask_token_id: int | None = None) -> DraftSpec:
    """The recipe's draft for a target of this raw text config; needs no weights.

    mask_token_id: None stands for the recipe's own. Raises RecipeError if there can be no such draft.
    """
    draft = recipe.draft.model_dump(exclude={"init", "vocab_size"})
    if mask_token_id is not None:
        draft["mask_token_id"] = mask_token_id
    size = recipe.draft.vocab_size
    try:
        return new_spec(target_config, algorithm=recipe.algorithm, draft_vocab_size=size, **draft)
    except (SpecError, ValueError) as error:
        raise RecipeError(
            str(error), where=recipe.name, next_step="change the recipe's `draft` section"
        ) from error


def sized_spec(recipe: Recipe, target_config: dict[str, Any]) -> DraftSpec:
    """As `draft_spec`, before the target is loaded: a mask token chosen later changes no size."""
    needs_mask = ALGORITHMS[recipe.algorithm].needs_mask
    return draft_spec(recipe, target_config, recipe.draft.mask_token_id or 0 if needs_mask else None)


def trained_draft(name: str, spec: DraftSpec, target: Target) -> NeuralDraft:
    """A draft to fine-tune. Raises RecipeError if it is not what the recipe describes."""
    draft = load_draft(name, target, settled=False)
    names = [field.name for field in fields(spec) if field.compare]
    other = [name for name in names if getattr(draft.spec, name) != getattr(spec, name)]
    if other:
        sides = "; ".join(f"{n} {getattr(draft.spec, n)}, the recipe {getattr(spec, n)}" for n in other)
        raise RecipeError(
            f"{name} is not the draft that the recipe describes: it has {sides}",
            next_step="change the recipe's `algorithm` and `draft` section to the draft's, "
            "or train without --from",
        )
    draft.spec = spec  # with the recipe's weights of the loss
    return draft.requires_grad_(True)


def mask_token(target: Target, chosen: int | None = None) -> int:
    """The id whose embedding stands for "not known yet" in a block: `chosen`, or one by rule.

    The rule takes the first of these that is fit: the tokenizer's own mask token, the family's reserved id,
    an embedding row that the tokenizer has no token for, a token that is reserved by name, the unknown token,
    the first token of a text, any other control token. Raises RecipeError for an id that the target reads or
    writes (`unfit_for_mask`), and if none is fit.
    """
    if chosen is not None:
        if (why := unfit_for_mask(target, chosen)) is None:
            return chosen
        raise RecipeError(
            f"draft.mask_token_id {chosen} {why}, so it cannot stand for a block's unknown tokens",
            where=target.spec.name,
            next_step="leave draft.mask_token_id out, and a fitting one is chosen",
        )
    for candidate in _mask_candidates(target):
        if unfit_for_mask(target, candidate) is None:
            return candidate
    raise RecipeError(
        f"{target.spec.name} has no token to spare for the mask: every id is text or used otherwise",
        next_step="name a special token that the target never writes (draft.mask_token_id=ID), or train "
        "Eagle-3, which needs no mask token (such as `eagle3/generic`)",
    )


def _mask_candidates(target: Target) -> Iterator[int]:
    """Candidates for the mask token, best first; some may be unfit."""
    tokenizer, reserved = target.tokenizer, target.spec.family.mask_token_id
    tokens: dict[str, int] = {} if tokenizer is None else tokenizer.get_vocab()
    yield from (tokens[name] for name in ("<|mask|>", "<|MASK|>", "<mask>", "[MASK]") if name in tokens)
    if reserved is not None:
        yield reserved
    taken = set(tokens.values())
    # Without a tokenizer nothing tells which rows are free: the last one comes first.
    rows = range(len(target.embedding.weight))
    yield from (row for row in (rows if taken else reversed(rows)) if row not in taken)
    yield from (tokens[name] for name in sorted(tokens) if re.search("unused|reserved", name))
    for special in ("unk_token_id", "bos_token_id"):
        if (found := getattr(tokenizer, special, None)) is not None:
            yield int(found)
    # SmolLM2 reserves nothing, but has marks of its training data, such as <reponame>.
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    yield from (i for i, token in sorted(added.items()) if token.special)


def unfit_for_mask(target: Target, token: int) -> str | None:
    """Why an id cannot be the mask token (it has no embedding, ends or pads, or occurs in text), or None."""
    rows, tokenizer, config = len(target.embedding.weight), target.tokenizer, target.spec.config
    if not 0 <= token < rows:
        return f"is outside the target's embedding of {rows} rows"
    ends = config.get("eos_token_id")
    if token in {*target.stop_token_ids, *(ends if isinstance(ends, list) else [ends])}:
        return "ends the target's answers"
    if token in (config.get("pad_token_id"), getattr(tokenizer, "pad_token_id", None)):
        return "is the padding, whose embedding may be zero"
    text = None if tokenizer is None else {i: t for t, i in tokenizer.get_vocab().items()}.get(token)
    if tokenizer is None or text is None:
        return None
    if token not in tokenizer.added_tokens_decoder and token not in tokenizer.all_special_ids:
        return f"is {text!r}, which is ordinary text"
    written = text in str(tokenizer.chat_template or "")
    return f"is {text!r}, which the chat template writes" if written else None


def feature_layers(recipe: Recipe, target_config: dict[str, Any]) -> tuple[int, ...]:
    """The target's layers that the recipe's draft reads; needs no weights. Raises RecipeError."""
    return draft_spec(recipe, target_config).target_layer_ids


def read_rules(recipe: Recipe) -> tuple[str, ...]:
    """Names of the `blocks.READ_RULES` for the target's outputs that the recipe's loss reads."""
    return ALGORITHMS[recipe.algorithm].reads(recipe.loss)
