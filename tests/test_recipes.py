"""The published recipes: their values, and the drafts they describe, built without weights."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

import plan_examples
import recipe_parameters
import reproduce_cost
from deepspec.checkpoints.inspect import parameters
from deepspec.checkpoints.read import copy_shapes, draft_shapes
from deepspec.checkpoints.servers import Facts, refuse
from deepspec.config import Recipe, load_recipe
from deepspec.cost.formulas import state_bytes_per_parameter
from deepspec.drafts.spec import read_spec, write_config
from deepspec.errors import RecipeError
from deepspec.families import default_target_layers
from deepspec.planning import without_gpu
from deepspec.recipe_files import recipe_names
from deepspec.train.build import draft_spec
from golden_case import FOLDER

PUBLISHED = FOLDER.parent / "published"
ALGORITHMS = ("eagle3", "dflash", "dspark")
QWEN3 = ("qwen3-4b", "qwen3-8b", "qwen3-14b")
TARGETS = {
    "qwen3-4b": ("Qwen/Qwen3-4B", [1, 9, 17, 25, 33], 151669),
    "qwen3-8b": ("Qwen/Qwen3-8B", [1, 9, 17, 25, 33], 151669),
    "qwen3-14b": ("Qwen/Qwen3-14B", [1, 10, 19, 28, 37], 151669),
    "gemma4-12b": ("google/gemma-4-12B-it", [5, 17, 29, 41, 46], 4),
}
needs_published = pytest.mark.skipif(
    not (PUBLISHED / "draft_shapes.json").is_file(),
    reason=f"no published shapes at {PUBLISHED}; set DEEPSPEC_GOLDEN_DIR to the golden folder beside it",
)


def published(file: str) -> Any:
    return json.loads((PUBLISHED / file).read_text("utf-8"))


def test_twelve_published_recipes_and_three_more_for_each_algorithm():
    names = {f"{a}/{t}" for a in ALGORITHMS for t in (*TARGETS, "generic", "small", "one-gpu")}
    assert {n for n in recipe_names() if "/" in n} == names


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("target", TARGETS)
def test_published_recipe_has_every_published_value(algorithm: str, target: str) -> None:
    recipe = load_recipe(f"{algorithm}/{target}")
    name, layers, mask = TARGETS[target]
    optim, draft, loss = recipe.optim, recipe.draft, recipe.loss
    assert (recipe.target, draft.target_layer_ids, draft.mask_token_id) == (name, layers, mask)
    assert (optim.lr, optim.warmup, optim.weight_decay, optim.grad_clip) == (6e-4, 0.04, 0.0, 1.0)
    assert (optim.batch_size, optim.epochs, optim.max_steps, optim.max_minutes) == (512, 10, None, None)
    assert (recipe.data.max_length, recipe.num_anchors, recipe.precision) == (4096, 512, "bfloat16")
    assert (draft.block, recipe.thinking) == (7, False)
    assert draft.num_layers == (1 if algorithm == "eagle3" else 5)
    if algorithm == "eagle3":
        assert (draft.step_loss_decay, loss.ce) == (0.8, 1.0)
    elif algorithm == "dflash":
        assert (loss.ce, loss.l1, loss.confidence, loss.decay_gamma) == (1.0, 0.0, 0.0, 4.0)
    else:
        assert (loss.ce, loss.l1, loss.confidence, loss.decay_gamma) == (0.1, 0.9, 1.0, 4.0)
        assert (draft.markov_rank, draft.markov_head) == (256, "vanilla")
        assert (draft.confidence, draft.confidence_with_markov) == (True, True)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_generic_recipe_without_a_target_asks_for_one(algorithm: str) -> None:
    with pytest.raises(RecipeError, match="`target` is not set: add target=DIRECTORY"):
        load_recipe(f"{algorithm}/generic")
    recipe = load_recipe(f"{algorithm}/generic", ["target=some/model"])
    assert (recipe.target, recipe.draft.target_layer_ids, recipe.draft.mask_token_id) == (
        "some/model",
        None,
        None,
    )


def test_no_recipe_but_the_pockets_trains_on_the_pockets_prompts():
    for name in (n for n in recipe_names() if "/" in n):
        data = load_recipe(name, ["target=some/model"] if name.endswith(("generic", "small")) else []).data
        # A newcomer has no file of prompts to choose by; training on the packaged ones takes a choice.
        select = "pocket:select" if name.endswith("small") else "select.jsonl"
        assert (data.train, data.select) == ("answers.jsonl", select)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_small_recipe_is_one_that_a_cpu_and_llama_server_can_run(algorithm: str) -> None:
    """`generic` trains in bfloat16 on 64 sequences a step, and its Eagle-3 reads five layers."""
    recipe = load_recipe(f"{algorithm}/small", ["target=some/model"])
    smollm2 = {
        **{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536},
        **{"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
    }
    spec = draft_spec(recipe, smollm2, 3 if algorithm != "eagle3" else None)
    assert spec.target_layer_ids == (1, 14, 27)
    assert (recipe.precision, recipe.optim.batch_size, spec.draft_vocab_size) == ("float32", 4, 8192)
    refuse("llamacpp", Facts(spec, own=False, target=None))


def test_recipe_for_a_gpu_names_the_one_to_take_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    generic, small = (load_recipe(f"eagle3/{kind}", ["target=some/model"]) for kind in ("generic", "small"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "eagle3/small has the layers" in str(without_gpu(generic))
    assert without_gpu(small) is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert without_gpu(generic) is None


@pytest.mark.parametrize(
    ("depth", "count", "layers"),
    [(30, 3, [1, 14, 27]), (36, 5, [1, 9, 17, 25, 33]), (6, 3, [1, 2, 3]), (2, 3, [0]), (12, 1, [1])],
)
def test_any_number_of_feature_layers_is_spread_over_the_depth(depth, count, layers):
    assert default_target_layers(depth, count) == layers


# ── drafts of the published targets ───────────────────────────────────────────────────────────────────


@needs_published
@pytest.mark.parametrize("name", [f"{a}/{t}" for a in ALGORITHMS for t in QWEN3])
def test_qwen3_draft_has_every_tensor_of_the_published_one_in_its_shape(name: str) -> None:
    recipe = load_recipe(name)
    spec = draft_spec(recipe, published("target_dims.json")[recipe.target])
    want = published("draft_shapes.json")[name]
    ours = draft_shapes(spec) | copy_shapes(spec)
    assert {k: list(shape) for k, shape in ours.items()} == want["tensors"]
    assert sum(parameters(spec)) == want["parameters"]


@needs_published
def test_dimensions_that_the_recipes_page_is_computed_from_are_the_published_ones():
    dims = published("target_dims.json")
    assert {n: {k: dims[n][k] for k in facts} for n, facts in recipe_parameters.TARGETS.items()} == (
        recipe_parameters.TARGETS
    )


@pytest.mark.parametrize("target", QWEN3)
def test_published_qwen3_layers_are_those_of_the_rule(target: str) -> None:
    name, layers, _ = TARGETS[target]
    assert default_target_layers(recipe_parameters.TARGETS[name]["num_hidden_layers"]) == layers


def gemma_config(**changes: Any) -> dict[str, Any]:
    """A tiny Gemma-4 of the depth that the recipe's layers need."""
    return {
        "model_type": "gemma4_text",
        "vocab_size": 80,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "head_dim": 8,
        "global_head_dim": 16,
        "attention_k_eq_v": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": 30.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
        },
        **changes,
    }


def gemma_layer(prefix: str, fan_in: int, *, values: bool) -> dict[str, tuple[int, ...]]:
    """Tensors of one Gemma-4 draft layer of `gemma_config`, by the format's table."""
    kv = 2 * 16 if values else 1 * 16
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (64, fan_in),
        "self_attn.k_proj.weight": (kv, fan_in),
        "self_attn.o_proj.weight": (32, 64),
        "self_attn.q_norm.weight": (16,),
        "self_attn.k_norm.weight": (16,),
        "mlp.gate_proj.weight": (48, 32),
        "mlp.up_proj.weight": (48, 32),
        "mlp.down_proj.weight": (32, 48),
        "layer_scalar": (1,),
    }
    for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        shapes[f"{norm}_layernorm.weight"] = (32,)
    if values:
        shapes["self_attn.v_proj.weight"] = (kv, fan_in)
    return {prefix + name: shape for name, shape in shapes.items()}


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gemma4_draft_has_the_tensors_of_its_layout(algorithm: str, values: bool) -> None:
    config = gemma_config(attention_k_eq_v=not values)
    spec = draft_spec(load_recipe(f"{algorithm}/gemma4-12b"), config)
    want: dict[str, tuple[int, ...]] = {"fc.weight": (32, 5 * 32), "norm.weight": (32,)}
    if algorithm == "eagle3":
        want |= gemma_layer("layers.0.", 64, values=values) | {"layers.0.hidden_norm.weight": (32,)}
    else:
        want["hidden_norm.weight"] = (32,)
        for i in range(5):
            want |= gemma_layer(f"layers.{i}.", 32, values=values)
    if algorithm == "dspark":
        want |= {"markov_head.markov_w1.weight": (80, 256), "markov_head.markov_w2.weight": (80, 256)}
        want |= {"confidence_head.proj.weight": (1, 32 + 256), "confidence_head.proj.bias": (1,)}
    assert draft_shapes(spec) == want
    assert (spec.softcap, spec.shape.attention_scale) == (30.0, 1.0)
    assert read_spec(json.loads(json.dumps(write_config(spec, config)))) == spec


# ── the page ──────────────────────────────────────────────────────────────────────────────────────────


def test_recipes_page_holds_what_is_computed():
    page = recipe_parameters.PAGE.read_text("utf-8")
    found = page.split(recipe_parameters.BEGIN)[1].split(recipe_parameters.END)[0]
    assert found == recipe_parameters.published(), "run: python benchmarks/recipe_parameters.py"
    assert "| 1,393,133,569 |" in found
    assert "| 1,315,339,520 |" in found


def test_one_gpu_drafts_leave_room_beside_the_target_on_24_gb():
    """Training state and an 8.0 GB target, with at least a fifth of the card for activations."""
    dims = recipe_parameters.TARGETS["Qwen/Qwen3-4B"]
    for algorithm in ALGORITHMS:
        recipe: Recipe = load_recipe(f"{algorithm}/one-gpu")
        own = sum(math.prod(shape) for shape in draft_shapes(draft_spec(recipe, dims)).values())
        each = state_bytes_per_parameter(recipe.precision, recipe.optim.states, recipe.offload_optimizer)
        assert 8.04 + 1e-9 * each * own < 0.8 * 24
        assert recipe.optim.micro_batch_size == 1


def test_page_of_costs_is_what_the_script_computes():
    text = reproduce_cost.PAGE.read_text("utf-8")
    assert text.split(reproduce_cost.BEGIN)[1].split(reproduce_cost.END)[0] == reproduce_cost.table()
    # 38 TB at 30,726 bytes a token for Qwen3-4B is where the token count comes from: it must come back.
    names = reproduce_cost.published_plan("dspark/qwen3-4b").inputs.names
    assert names["tokens"] * 30_726 == pytest.approx(38e12)
    server = {"process": "at 400, in process", "server": "at 25 GPU-hours for 4B"}
    for engine, words in server.items():
        hours = reproduce_cost.published_plan("dspark/qwen3-4b", engine).sections["time"]["regeneration"]
        assert words in text and f" {hours.value / 3600:.0f}" in words


@pytest.mark.parametrize(("name", "machine", "features"), plan_examples.EXAMPLES)
def test_examples_of_the_plan_page_are_what_the_command_prints(
    name: str, machine: str, features: str
) -> None:
    begin, end = plan_examples.marks(name, machine)
    found = plan_examples.PAGE.read_text("utf-8").split(begin)[1].split(end)[0]
    assert found == plan_examples.example(name, machine, features), "run: python benchmarks/plan_examples.py"
