"""A draft's first weights: drawn, or the target's own last layers (`draft.init`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepspec.config import Recipe
from deepspec.drafts.layers import DraftLayer
from deepspec.errors import RecipeError
from deepspec.targets import Target
from deepspec.train.build import build_draft
from talking import recipe_tree


def recipe_for(algorithm: str, **draft: object) -> Recipe:
    tree = recipe_tree(Path("unused"), Path("unused"), algorithm)
    return Recipe.model_validate(tree | {"draft": tree["draft"] | draft})


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("algorithm", ["dspark", "dflash", "eagle3"])
def test_matrices_come_from_the_last_layers_in_their_order_and_only_in_the_half_that_reads_the_hidden_state(
    targets: dict[str, Target], family: str, algorithm: str
) -> None:
    target = targets[family]
    drawn = build_draft(recipe_for(algorithm), target)
    draft = build_draft(recipe_for(algorithm, init="target"), target)
    width = draft.spec.shape.hidden
    layers = [part for part in draft.modules() if isinstance(part, DraftLayer)]
    first = dict(drawn.named_parameters())
    expected = dict(first)
    for i, prefix in enumerate(n for n, part in draft.named_modules() if isinstance(part, DraftLayer)):
        last = target.decoder.layers[target.spec.num_layers - len(layers) + i]
        for name in ("gate_proj", "up_proj", "down_proj"):
            expected[f"{prefix}.mlp.{name}.weight"] = getattr(last.mlp, name).weight
        for name in "qkvo":
            theirs = getattr(last.self_attn, f"{name}_proj").weight
            key = f"{prefix}.self_attn.{name}_proj.weight"
            paired = algorithm == "eagle3" and name != "o"
            # Of the embedding's half nothing is known: it stays as drawn.
            expected[key] = torch.cat([first[key][:, :width], theirs], dim=1) if paired else theirs
    deepest = torch.zeros_like(first["fc.weight"])
    deepest[:, -width:] = torch.eye(width)
    expected["fc.weight"] = deepest
    wrong = [n for n, p in draft.named_parameters() if not torch.equal(p, expected[n])]
    assert wrong == []
    assert all(p.requires_grad for p in draft.parameters())


def test_training_a_draft_that_began_as_its_target_leaves_that_alone(targets: dict[str, Target]) -> None:
    target = targets["qwen3"]
    before = {n: p.clone() for n, p in target.model.named_parameters()}
    draft = build_draft(recipe_for("dspark", init="target"), target)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(1.0)
    assert [n for n, p in target.model.named_parameters() if not torch.equal(p, before[n])] == []


def test_a_draft_of_another_width_than_the_targets_layers_is_refused_by_name_and_both_shapes(
    targets: dict[str, Target],
) -> None:
    target = targets["qwen3"]
    width, inner = target.spec.hidden_size, target.spec.config["intermediate_size"]
    with pytest.raises(RecipeError) as error:
        build_draft(recipe_for("dspark", init="target", intermediate_size=inner + 8), target)
    assert f"mlp.gate_proj.weight of {[inner + 8, width]}" in str(error.value)
    assert f"have {[inner, width]}" in str(error.value)
    assert "draft.init=random" in str(error.value)
