"""The cost of a recipe before anything runs: exact figures, oracles for operations and memory, refusals."""

from __future__ import annotations

import ctypes
import gc
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from typer.testing import CliRunner

from deepspec import speeds as profile
from deepspec.checkpoints.read import draft_shapes
from deepspec.cli import app
from deepspec.config import KEPT_CHECKPOINTS, Recipe, load_recipe
from deepspec.cost.dimensions import PUBLISHED_TARGETS, draft_dimensions, target_dimensions
from deepspec.cost.fit import cheapest_change
from deepspec.cost.formulas import (
    activation_bytes,
    cache_bytes_per_token,
    draft_flops,
    draft_parameters,
    figure,
    forward_flops,
    head_flops,
    slots_that_count,
    state_bytes_per_parameter,
)
from deepspec.cost.inputs import PUBLISHED_TOKENS, Inputs, assumed_counts, published_counts
from deepspec.cost.machines import MACHINES
from deepspec.cost.plan import make_plan
from deepspec.cost.sizes import disk_figures, host_figures, memory_figures, momentum
from deepspec.cost.step_time import Measured, Speeds, TrainSpeed, rounds_needed, speed_key
from deepspec.data.tokens import Encoded
from deepspec.decode.engine import Request
from deepspec.drafts import ALGORITHMS as DRAFTS
from deepspec.drafts import LossSettings
from deepspec.drafts.base import NeuralDraft
from deepspec.drafts.spec import DraftSpec, new_spec
from deepspec.errors import DataError
from deepspec.features.batches import load_rows, online
from deepspec.features.cache_write import plan_cache
from deepspec.maths.blocks import FeatureBatch
from deepspec.maths.chunking import CHUNK_BYTES
from deepspec.maths.head import Embedding, Head
from deepspec.maths.verify import Sampling
from deepspec.planning import count_file, describe, prepare
from deepspec.targets import Target, TargetSpec
from deepspec.train.build import build_draft
from deepspec.train.loop import train_step
from deepspec.train.optimizer import Optimizer
from deepspec.train.run import Progress, Run
from kills import ended, in_child, needs_fork
from talking import recipe_tree, save_talking_llama, write_data, write_recipe, write_rows

QWEN3_4B = PUBLISHED_TARGETS["Qwen/Qwen3-4B"]
ALGORITHMS = ("eagle3", "dflash", "dspark")


# ── figures ───────────────────────────────────────────────────────────────────────────────────────────


def test_figure_is_what_its_formula_says_with_the_numbers_put_in():
    found = figure("bytes", "width * hidden * (layers + 1) + ids", width=2, hidden=2560, layers=5, ids=6)
    assert (found.value, found.numbers) == (30_726, "2 × 2,560 × (5 + 1) + 6")
    assert figure("s", "max(a / 2, ceil(b))", a=3, b=1.2).value == 2


def test_formula_with_a_name_that_was_not_given_is_an_error_not_a_zero():
    with pytest.raises(KeyError):
        figure("bytes", "rows * width", rows=3)


# ── bytes ─────────────────────────────────────────────────────────────────────────────────────────────


def test_cache_of_qwen3_4b_is_30_7_kb_a_token_and_the_published_one_38_tb():
    # Six vectors of bfloat16, an id and a mask; the published layout keeps two masks.
    assert cache_bytes_per_token(2560, 5).value == 30_725
    # One byte a number and a float32 scale for each of six vectors.
    assert [cache_bytes_per_token(2560, 5, store).value for store in ("fp8", "int8")] == [15_389, 15_389]
    assert cache_bytes_per_token(2560, 5, last_share=0.5).value == 2 * 2560 * 5.5 + 5
    counts = published_counts()
    tokens = counts.rows * (counts.prompts[0] + counts.answers[0])
    assert tokens == pytest.approx(PUBLISHED_TOKENS) and tokens * 30_726 == pytest.approx(38e12)


def test_state_of_a_draft_is_20_bytes_a_parameter_in_bfloat16_and_16_in_float32():
    assert (state_bytes_per_parameter("bfloat16"), state_bytes_per_parameter("float32")) == (18, 16)


@pytest.mark.parametrize("head", [None, "vanilla", "gated", "rnn"])
@pytest.mark.parametrize("matrices", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_state_bytes_are_those_of_a_real_optimiser(precision: str, matrices: str, head: str | None):
    """Weight, master and gradient as they are after the backward pass, and moments after a step."""
    spec = tiny_spec("dspark" if head else "dflash")
    spec = replace(spec, markov_head=head) if head else spec
    draft = tiny_draft(spec, torch.bfloat16 if precision == "bfloat16" else torch.float32)
    recipe = load_recipe("pocket-dflash", [f"precision={precision}", f"optim.matrices={matrices}"])
    optimizer = Optimizer(draft, recipe.optim)
    sum(parameter.sum() for parameter in draft.parameters()).backward()
    holders = {id(t): t for t in (*draft.parameters(), *optimizer.masters)}.values()
    held = [t for holder in holders for t in (holder, holder.grad)]
    optimizer.step(0.5)
    states = [state for each in optimizer.steppers.values() for state in each.state.values()]
    moments = [t for state in states for t in state.values() if t.dim()]
    size = sum(t.numel() * t.element_size() for t in (*held, *moments) if t is not None)
    own = sum(p.numel() for p in draft.parameters())
    matrix = draft_dimensions(draft.spec, own, precision)["matrices"]
    assert size == own * state_bytes_per_parameter(precision) + matrix * momentum(recipe)


@pytest.fixture(scope="module")
def pocket() -> Target:
    return Target.from_pretrained("pocket", device="cpu")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_checkpoint_on_disk_has_the_bytes_that_the_plan_counts(
    pocket: Target, tmp_path: Path, precision: str
):
    recipe = load_recipe("pocket-dspark", [f"precision={precision}"])
    draft = build_draft(recipe, pocket)
    optimizer = Optimizer(draft, recipe.optim)
    sum(parameter.sum() for parameter in draft.parameters()).backward()
    optimizer.step(0.5)
    Run(tmp_path, recipe).save(draft, optimizer, Progress(1), pocket, {})
    folder = tmp_path / "checkpoints" / "step_1"
    moments = (folder / "optimizer.pt").stat().st_size
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    # Those kept, the one being written, and the best one, which is weights alone.
    written = (KEPT_CHECKPOINTS + 1) * (moments + weights) + weights
    inputs = Inputs(recipe, pocket.spec.config, assumed_counts(9, 50, 60), MACHINES["h100"], describe)
    assert disk_figures(inputs)["checkpoints"].value == pytest.approx(written, rel=0.02)


def test_eight_bit_moments_are_counted_in_memory_and_in_every_checkpoint():
    """12 bytes a trained parameter (docs/log.md): arithmetic, since bitsandbytes is not installed here."""
    assert state_bytes_per_parameter("bfloat16", "8bit") == pytest.approx(12, abs=0.04)
    wide, narrow = (
        plan_of("dspark/qwen3-4b", "h100", f"optim.states={states}").sections["disk"]["checkpoints"].value
        for states in ("float32", "8bit")
    )
    saved = 8 - 2 * (1 + 4 / 256)
    assert wide - narrow == pytest.approx(615_221_249 * (KEPT_CHECKPOINTS + 1) * saved)


# ── parameters ────────────────────────────────────────────────────────────────────────────────────────


def test_dimensions_that_ship_count_the_published_parameters():
    counted = {name: target_dimensions(c)["parameters"] for name, c in PUBLISHED_TARGETS.items()}
    # 4.02, 8.19 and 14.77 billion, as their pages say; norms of queries and keys are left out here.
    assert [round(c / 1e9, 2) for c in counted.values()] == [4.02, 8.19, 14.77]


SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "tie_word_embeddings": False,
}
TARGETS: dict[str, tuple[Any, Any]] = {
    "qwen3, tied": (
        Qwen3ForCausalLM,
        Qwen3Config(
            **{**SMALL, "tie_word_embeddings": True},
            intermediate_size=160,
            num_key_value_heads=2,
            head_dim=32,
        ),
    ),
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL, intermediate_size=160, num_key_value_heads=2)),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(
            **SMALL, intermediate_size=96, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2
        ),
    ),
    "qwen3 moe, one dense layer": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            **SMALL,
            intermediate_size=160,
            moe_intermediate_size=32,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=16,
            num_experts_per_tok=4,
            mlp_only_layers=[0],
        ),
    ),
    "deepseek": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config(
            **SMALL,
            intermediate_size=160,
            moe_intermediate_size=32,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_shared_experts=1,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            kv_lora_rank=24,
            q_lora_rank=32,
            qk_rope_head_dim=8,
            qk_nope_head_dim=16,
            v_head_dim=16,
        ),
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_parameters_are_those_of_the_model_built_without_weights(name: str):
    kind, config = TARGETS[name]
    with torch.device("meta"):
        model = kind(config)
    total = sum(p.numel() for p in model.parameters())
    assert target_dimensions(config.to_dict())["parameters"] == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize(
    "name", [f"{a}/{t}" for a in ALGORITHMS for t in ("qwen3-4b", "one-gpu", "qwen3-14b")]
)
def test_parameters_of_a_draft_are_those_of_its_tensors_but_for_norms_and_confidence(name: str):
    recipe = load_recipe(name)
    spec, own = describe(recipe, PUBLISHED_TARGETS[recipe.target])
    assert own == sum(math.prod(shape) for shape in draft_shapes(spec).values())
    found = draft_parameters(draft_dimensions(spec, own, recipe.precision))
    small = float(found.numbers.split(" + ")[-1].replace(",", ""))
    assert found.value == own and 0 < small < 1e-3 * own


def test_token_of_a_mixture_passes_its_experts_only():
    """Mixtral's 2 of 8: the MLP that a token passes is a quarter of all, attention and router are whole."""
    _, config = TARGETS["mixtral"]
    dims = target_dimensions(config.to_dict())
    attention, expert, router = 64 * 16 * (2 * 4 + 2 * 2), 3 * 64 * 96, 8 * 64
    assert dims["body"] == 4 * (attention + router + 8 * expert)
    assert dims["active"] == 4 * (attention + router + 2 * expert)


# ── operations ────────────────────────────────────────────────────────────────────────────────────────


def tiny_spec(algorithm: str, *, block: int = 4) -> DraftSpec:
    config = {
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 448,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 256,
        "num_hidden_layers": 12,
    }
    deep = algorithm != "eagle3"
    return new_spec(
        config,
        algorithm=algorithm,
        num_layers=2 if deep else 1,
        block=block,
        mask_token_id=3,
        **({"markov_rank": 16, "confidence": True} if algorithm == "dspark" else {}),
    )


def tiny_draft(spec: DraftSpec, dtype: torch.dtype = torch.float32) -> NeuralDraft:
    torch.manual_seed(0)
    draft = DRAFTS[spec.algorithm].build(spec).to(dtype)
    weight = torch.randn(spec.vocab_size, spec.shape.hidden).to(dtype)
    draft.bind(Embedding(weight), Head(weight))
    return draft


def tiny_batch(spec: DraftSpec, rows: int, length: int, dtype: torch.dtype = torch.float32) -> FeatureBatch:
    """The first third of every row is its prompt."""
    torch.manual_seed(1)
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[:, : length // 3] = False
    width = spec.shape.hidden
    return FeatureBatch(
        torch.randint(5, spec.vocab_size, (rows, length)),
        mask,
        torch.randn(rows, length, len(spec.target_layer_ids) * width).to(dtype),
        torch.randn(rows, length, width).to(dtype),
        torch.full((rows,), length),
    )


def loss_of(algorithm: str) -> LossSettings:
    return LossSettings(ce=1.0, l1=0.0 if algorithm == "eagle3" else 0.9, confidence=1.0)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("rows", "length", "anchors", "block"), [(2, 96, 24, 4), (1, 150, 40, 7)])
def test_operations_of_a_draft_are_those_that_torch_counts(
    algorithm, rows, length, anchors, block, monkeypatch
):
    """Attention is written out, in groups of one block: torch counts no flash kernel on a CPU."""
    monkeypatch.setattr("deepspec.drafts.attention._has_flash", lambda q, hidden: False)
    monkeypatch.setattr("deepspec.drafts.dflash.BLOCKS", 1)
    spec = tiny_spec(algorithm, block=block)
    draft, batch = tiny_draft(spec), tiny_batch(spec, rows, length)
    plan: Any = draft.plan(batch, anchors, torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        draft(batch, loss_of(algorithm), plan, False).total.backward()
    supervised = length - length // 3
    drawn = min(anchors, supervised - 1)
    slots = block * supervised if algorithm == "eagle3" else drawn * slots_that_count(supervised, block)
    # Written out, causal attention is computed whole.
    keys = length if plan is None else plan.anchors.double().mean().item()
    taught = (
        rows * supervised
        if plan is None
        else sum(len(t[v].unique()) for t, v in zip(plan.teacher_index, plan.valid, strict=True))
    )
    names = draft_dimensions(spec, 0, "float32")
    ours = draft_flops(names, rows, length, keys, drawn).value + head_flops(names, rows * slots, taught).value
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("name", ["qwen3, tied", "mixtral"])
def test_operations_of_a_targets_pass_are_those_that_torch_counts(name: str):
    kind, config = TARGETS[name]
    torch.manual_seed(0)
    model = kind(config).eval()
    if "mixtral" in name:
        model.set_experts_implementation("eager")  # grouped products are not counted
    ids = torch.randint(0, 512, (2, 48))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(input_ids=ids)
    ours = forward_flops(target_dimensions(config.to_dict()), ids.numel(), 48, logits=ids.numel())
    assert ours.value == pytest.approx(counter.get_total_flops(), rel=0.03)


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("rows", "length", "anchors", "block", "dtype"),
    [(2, 96, 24, 4, torch.float32), (1, 256, 16, 7, torch.bfloat16)],
)
def test_activations_are_what_autograd_keeps(algorithm, rows, length, anchors, block, dtype):
    spec = tiny_spec(algorithm, block=block)
    draft, batch = tiny_draft(spec, dtype), tiny_batch(spec, rows, length, dtype)
    given = [*draft.parameters(), draft.head.weight, batch.features, batch.last_hidden]
    known = {t.untyped_storage().data_ptr() for t in given}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    plan: Any = draft.plan(batch, anchors, torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        draft(batch, loss_of(algorithm), plan, False)
    size = sum(t.untyped_storage().nbytes() for t in kept.values())
    names = draft_dimensions(spec, 0, str(dtype).removeprefix("torch."))
    assert activation_bytes(names, rows, length, anchors).value == pytest.approx(size, rel=0.08)


# ── plans ─────────────────────────────────────────────────────────────────────────────────────────────


def plan_of(name: str, machine: str, *overrides: str, disk: float | None = None, **choices: Any) -> Any:
    recipe: Recipe = load_recipe(name, overrides)
    config, row = PUBLISHED_TARGETS[recipe.target], MACHINES[machine]
    return make_plan(Inputs(recipe, config, published_counts(), row, describe, free_disk=disk, **choices))


@pytest.mark.parametrize(
    ("disk", "words"),
    [(20e12, ("--store fp8",)), (18e12, ("--features online",)), (2e12, ("--features online",))],
)
def test_cheaper_ways_of_storing_come_before_dearer_ones(disk: float, words: tuple[str, ...]):
    plan = plan_of("dspark/qwen3-4b", "h100", disk=disk, features="cache")
    assert [n.what for n in plan.needs if not n.fits] == ["disk"]
    change = cheapest_change(plan.inputs)
    assert change is not None and change.words == words and all(n.fits for n in change.needs)


@pytest.mark.parametrize("store", ["bf16", "fp8", "int8"])
def test_planned_bytes_of_a_cache_are_those_that_writing_one_counts(targets: dict[str, Target], store: str):
    target = targets["qwen3"]
    rows = [
        Encoded([*range(n)], [*[0] * prompt, *[1] * (n - prompt)], f"r{n}")
        for n, prompt in ((30, 7), (12, 3), (9, 8))
    ]
    cache = plan_cache(rows, target, (0, 1, 3), ["context", "labels"], dtype=store, about={})
    tokens, features, hidden = (sum(column) for column in zip(*cache.counts, strict=True))
    each = cache_bytes_per_token(
        target.spec.hidden_size, 3, store, features_share=features / tokens, last_share=hidden / tokens
    )
    assert tokens * each.value == pytest.approx(cache.payload, rel=1e-12)


def test_single_change_that_fits_is_named_alone_and_really_plans():
    plan = plan_of("dspark/qwen3-4b", "rtx4090", engine="server")
    assert [n.what for n in plan.needs if not n.fits] == ["accelerator memory, training"]
    change = cheapest_change(plan.inputs)
    assert change is not None and len(change.words) == 1
    key, _, value = change.words[0].partition("=")
    again = plan_of("dspark/qwen3-4b", "rtx4090", f"{key}={value}", engine="server")
    assert again.fits and again.needs == change.needs


def test_several_changes_are_named_where_no_single_one_is_enough_and_none_that_is_not_needed():
    plan = plan_of("eagle3/qwen3-4b", "rtx4090", "optim.micro_batch_size=8", disk=80e9, features="cache")
    change = cheapest_change(plan.inputs)
    assert change is not None and all(n.fits for n in change.needs) and len(change.words) > 1
    assert "--store fp8" not in change.words


def test_answers_that_do_not_fit_at_once_are_written_fewer_at_a_time():
    """Sixteen answers of 4,096 tokens have 10 GB of keys and values, in a store that may be twice as big."""
    plan = plan_of("eagle3/one-gpu", "rtx4090", "data.max_length=4096", "num_anchors=1", engine="process")
    answering = plan.sections["memory of the accelerator"]["answering"]
    assert answering.value == 2 * 4_022_458_880 + 2 * 16 * 4096 * 2 * 36 * 2048
    again = plan_of("dspark/one-gpu", "rtx4090", "data.max_length=4096")
    assert [n.what for n in again.needs if not n.fits] == ["accelerator memory, answering"]
    change = cheapest_change(again.inputs)
    assert change is not None and change.words == ("--batch 8",)


def test_nothing_is_promised_where_nothing_helps(monkeypatch):
    inputs = plan_of("dspark/qwen3-14b", "rtx3090").inputs
    change = cheapest_change(inputs)
    # 30 GB of target and 34 GB of draft state, and a sequence's activations.
    assert change is not None and change.words == ("--machine a100",)
    monkeypatch.setattr("deepspec.cost.fit.MACHINES", {})
    assert cheapest_change(inputs) is None


def test_epochs_and_steps_are_the_recipes():
    found = plan_of("dspark/qwen3-4b", "h100").sections
    assert found["data"]["optimiser steps"].value == 10 * math.ceil(1.3e6 / 512)
    assert found["time"]["features"].value == pytest.approx(
        10 * found["operations"]["features, an epoch"].value / (989e12 * 0.4)
    )
    cached = plan_of("dspark/qwen3-4b", "h100", features="cache").sections["time"]
    assert cached["features"].value == pytest.approx(found["time"]["features"].value / 10)


def test_budget_of_minutes_is_the_time_of_training():
    recipe = load_recipe("dspark/qwen3-4b", ["optim.max_minutes=60"])
    inputs = Inputs(recipe, QWEN3_4B, assumed_counts(10_000, 100, 300), MACHINES["h100"], describe)
    found = make_plan(inputs).sections["time"]
    assert found["features"].value + found["training"].value == pytest.approx(3600, rel=0.05)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 12))
def test_rounds_are_those_of_a_queue_played_through_round_by_round(lengths: list[int], slots: int):
    waiting, rows, rounds, row_rounds = [n - 1 for n in lengths], [], 0, 0
    while True:
        while waiting and len(rows) < slots:
            first = waiting.pop(0)
            if first:  # an answer of one token is done with its prefill
                rows.append(first)
        if not rows:
            break
        rounds, row_rounds = rounds + 1, row_rounds + len(rows)
        rows = [left - 1 for left in rows if left > 1]
    assert rounds_needed(lengths, slots) == (rounds, row_rounds)


# ── the command ───────────────────────────────────────────────────────────────────────────────────────


def call(*words: Any) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_json_of_a_plan_has_every_figure_with_its_formula(tmp_path: Path):
    where = ("--machine", "rtx4090", "--cache-dir", tmp_path)
    result = call("plan", "dspark/one-gpu", *where, "--rows", 1000, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found) == {
        "recipe", "target", "machine", "features", "sections", "needs", "fits", "notes", "change",
    }  # fmt: skip
    assert list(found["sections"]) == [
        "parameters", "data", "disk", "memory of the accelerator", "memory of the host",
        "operations", "time", "energy",
    ]  # fmt: skip
    for figures in found["sections"].values():
        for each in figures.values():
            assert set(each) == {"value", "unit", "formula"} and " = " in each["formula"]
    cache = found["sections"]["disk"]["cache in bf16"]
    assert cache["formula"] == "tokens × bytes_per_token = 9.513e+05 × 2.965e+04"
    assert {n["what"] for n in found["needs"]} == {
        "disk", "accelerator memory, training", "accelerator memory, answering", "host memory",
    }  # fmt: skip
    assert found["machine"]["name"] == "rtx4090" and found["change"] is None


def test_what_cannot_fit_is_refused_with_exit_code_2_and_the_change_that_makes_it_fit(tmp_path: Path):
    words = ("plan", "dspark/qwen3-4b", "--machine", "h100", "--cache-dir", tmp_path)
    words += ("--features", "cache")
    result = call(*words)
    assert result.exit_code == 2
    assert "disk: 36.7 TB needed" in result.stderr and "add --features online" in result.stderr
    as_json = call(*words, "--json")
    assert as_json.exit_code == 2
    assert json.loads(as_json.stdout)["change"]["add"] == ["--features online"]


def test_unknown_machine_is_refused_with_the_nearest_name():
    result = call("plan", "dspark/qwen3-4b", "--machine", "rtx409")
    assert result.exit_code == 2 and "did you mean rtx4090" in result.stderr


def test_every_published_recipe_plans_without_a_network():
    for name in (f"{a}/{t}" for a in ALGORITHMS for t in ("qwen3-4b", "qwen3-8b", "qwen3-14b", "one-gpu")):
        assert plan_of(name, "h200").sections["time"]["all"].value > 0


# ── counting ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_talking_llama(tmp_path_factory.mktemp("plan") / "llama")


def test_rows_of_an_answers_file_are_counted_token_by_token(llama_dir: Path, tmp_path: Path):
    tokenizer = TargetSpec.from_pretrained(str(llama_dir)).tokenizer()
    path = write_rows(tmp_path / "answers.jsonl", [("ab", "xyz"), ("abc", "x")])
    counts = count_file(path, tokenizer)(0.0)
    # One token a byte, and the end of the turn; prompts: three markers, "user", two line ends, "assistant",
    # another line end, and the empty think block.
    frame = 3 + len("user\n\nassistant\n<think></think>")
    assert counts.answers == (4.0, 2.0)
    assert counts.prompts == (frame + 2, frame + 3)
    assert (counts.rows, counts.answered, counts.notes) == (2, True, ())


def test_prompts_without_answers_are_counted_and_their_answers_noted_as_assumed(tmp_path: Path):
    path = write_rows(tmp_path / "prompts.jsonl", [("x" * 40, None), ("y" * 80, None)])
    counts = count_file(path, None)(300.0)
    assert (counts.prompts, counts.answers, counts.answered) == ((10.0, 20.0), (300.0, 300.0), False)
    assert "assumed to have 4 characters" in counts.notes[0]
    assert "answers are assumed to have 300 tokens" in counts.notes[1]


def test_long_file_is_sampled_over_all_of_it_and_long_lines_count_once(tmp_path: Path):
    """Half the rows are ten times as long as the others: places in the file meet them ten times as often."""
    path = tmp_path / "long.jsonl"
    rows = [("q", "a" * (400 if i % 2 else 4000)) for i in range(4000)]
    write_rows(path, rows)
    counts = count_file(path, None)(0.0)
    assert counts.rows == pytest.approx(4000, rel=0.15)
    assert len(counts.prompts) <= 1000
    mean = sum(counts.answers) / len(counts.answers)
    assert mean == pytest.approx(2200 / 4, rel=0.15)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "q", "score": NaN}', "malformed JSON"),
        (b'{"prompt": "q", "score": 1e999}', "a number is too large"),
        (b'{"prompt": "caf\xe9"}', "not UTF-8: byte 0xe9 at byte 16 of the line"),
    ],
)
def test_rows_of_a_long_file_are_read_as_strictly_as_those_of_a_short_one(monkeypatch, tmp_path, line, said):
    monkeypatch.setattr("deepspec.planning.LONG_FILE", 1)
    path = tmp_path / "long.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "q"}\n')
    assert count_file(path, None)(1.0).rows == pytest.approx(1, rel=0.3)
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(DataError, match=said) as caught:
        count_file(path, None)
    assert caught.value.where == f"{path}, byte 19"


def test_a_long_table_is_refused_with_the_command_that_converts_it(monkeypatch, tmp_path):
    monkeypatch.setattr("deepspec.planning.LONG_FILE", 1)
    path = tmp_path / "long.csv"
    path.write_text("prompt,response\nq,a\n")
    with pytest.raises(DataError, match="a table is given where a JSONL file is expected"):
        count_file(path, None)


def test_rows_take_as_much_host_memory_as_the_plan_counts(llama_dir: Path, tmp_path: Path):
    """The arrays that training really keeps."""
    data = write_rows(tmp_path / "rows.jsonl", [("ab" * i, "xyz" * i) for i in range(1, 30)])
    rows = load_rows(data, Target.from_pretrained(llama_dir), thinking=False, max_length=512)
    recipe = load_recipe("pocket-dspark", [f"target={llama_dir}"])
    inputs, _ = prepare(recipe, "h100", data=data)
    planned = host_figures(inputs, memory_figures(inputs))["tokens of the rows"]
    assert planned.value == rows.ids.nbytes + rows.loss_mask.nbytes


# ── a whole step, measured ────────────────────────────────────────────────────────────────────────────

STEPS_MEASURED = (("pocket-dspark", 3, 192), ("pocket-eagle3", 1, 192))


def peak() -> int:
    """Bytes of this process at its largest, since the peak was last forgotten."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def taken_by_a_step(target: Target, recipe: Recipe, rows: int, length: int) -> int:
    """Bytes that a step takes beyond what is there after the one before it."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: tensors get pages of their own, not what earlier tests freed
    draft = build_draft(recipe, target, [])
    optimizer, source = Optimizer(draft, recipe.optim), online(target, draft.feature_layers)
    before = 0
    ids, mask = [7 + i % 900 for i in range(length)], [0, 0] + [1] * (length - 2)
    for _ in range(2):  # the first also loads code, and makes the library of products keep some megabytes
        gc.collect()
        libc.malloc_trim(0)  # what is free goes back, or a step would be served from it
        Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
        before = peak()
        batch = [Encoded(ids, mask, str(row)) for row in range(rows)]
        train_step(draft, source, batch, recipe, 1, measure=False, optimizer=optimizer)
        optimizer.step(0.5)
    return peak() - before


@needs_fork
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks cannot be read here")
@pytest.mark.parametrize(("name", "rows", "length"), STEPS_MEASURED)
def test_step_takes_the_memory_that_its_plan_says(
    pocket: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, rows: int, length: int
):
    """Features, activations and the loss of a large step, in a process of its own. A chunk of the vocabulary
    is a sixteenth of the usual one, as the step is smaller than a real one too."""
    monkeypatch.setattr("deepspec.maths.chunking.CHUNK_BYTES", CHUNK_BYTES // 16)
    parts = (
        "features of a micro-batch",
        "activations of a micro-batch",
        "head and loss",
    )
    overrides = [f"optim.batch_size={rows}", f"data.max_length={length}", "num_anchors=48"]
    recipe = load_recipe(name, overrides)
    counts = assumed_counts(100, 2, length - 2)
    plan = make_plan(Inputs(recipe, pocket.spec.config, counts, MACHINES["laptop-cpu"], describe))
    wanted = sum(plan.sections["memory of the model"][part].value for part in parts)
    found = tmp_path / "bytes"
    assert ended(in_child(lambda: found.write_text(str(taken_by_a_step(pocket, recipe, rows, length)))))
    ratio = int(found.read_text()) / wanted
    assert 0.8 < ratio < 1.1


def test_several_accelerators_share_the_work_but_not_the_state_of_the_draft():
    words = ("plan", "dspark/qwen3-4b", "--machine", "h100", "--rows", 1000, "--json", "--gpus")
    one, four = (json.loads(call(*words, n).stdout)["sections"] for n in (1, 4))
    ratio = {k: four["time"][k]["value"] / one["time"][k]["value"] for k in four["time"]}
    assert ratio["features"] == pytest.approx(0.25) and 0.25 < ratio["training"] < 0.3
    assert ratio["regeneration"] == 1.0  # rank 0 alone writes the answers
    place = "memory of the accelerator"
    assert four[place]["draft, gradients, optimiser"] == one[place]["draft, gradients, optimiser"]
    split = json.loads(call(*words, 4, "shard_target=true").stdout)["sections"][place]["target weights"][
        "value"
    ]
    assert 0.25 < split / one[place]["target weights"]["value"] < 0.5
    answering = [
        json.loads(call(*words, 4, word).stdout)["sections"][place]["answering"]["value"]
        for word in ("shard_target=true", "shard_target=false")
    ]
    assert answering[0] == answering[1], "one device writes the answers, alone"
    parts = json.loads(call(*words, 4, "shard_draft=true").stdout)["sections"]
    state = parts[place]["draft, gradients, optimiser"]["value"]
    assert state / four[place]["draft, gradients, optimiser"]["value"] == pytest.approx(12 / 18)
    assert parts["time"]["training"]["value"] > four["time"]["training"]["value"]
    host = "memory of the host"
    assert four[host]["at most at once"]["value"] == 4 * one[host]["at most at once"]["value"]
    small = call("plan", "dspark/qwen3-4b", "--machine", "rtx4090", "--gpus", 4, "--rows", 1000)
    assert small.exit_code == 2 and "shard_draft=true" in small.output
    uneven = call(*words, 3)
    assert uneven.exit_code == 2 and "which 3 accelerators cannot share evenly" in uneven.output


# ── this machine ──────────────────────────────────────────────────────────────────────────────────────


def test_measured_speeds_are_kept_by_machine_and_target_and_the_second_plan_measures_nothing(
    llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("DEEPSPEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(profile, "STEPS", 2)
    real = profile.measure
    monkeypatch.setattr(
        "deepspec.planning.measure",
        lambda recipe, some, **how: real(recipe, some[:3], **{**how, "max_new_tokens": 12}),
    )
    write_data(tmp_path)
    recipe = write_recipe(tmp_path / "tiny.yaml", recipe_tree(llama_dir, tmp_path, "dspark"))
    first = call("plan", recipe, "--json")
    assert first.exit_code == 0, first.output
    monkeypatch.setattr("deepspec.planning.measure", lambda *a, **k: pytest.fail("measured again"))
    second = call("plan", recipe, "--json")
    found = json.loads(second.stdout)
    assert json.loads(first.stdout)["sections"] == found["sections"]
    assert found["machine"]["name"] == "here"
    assert found["sections"]["time"]["training"]["value"] > 0
    assert any(note.startswith("the speeds were measured on") for note in found["notes"])
    # Another micro-batch has another speed: that one has to be measured.
    with pytest.raises(pytest.fail.Exception):
        CliRunner().invoke(app, ["plan", str(recipe), "optim.batch_size=2"], catch_exceptions=False)


def test_plan_of_a_recipe_that_trains_from_a_cache_has_one_unless_told_otherwise():
    words = (
        "plan",
        "dspark/qwen3-4b",
        "data.features=cache:there",
        "--machine",
        "h100",
        "--rows",
        1000,
        "--json",
    )
    for more, features in (((), "cache"), (("--features", "online"), "online")):
        assert json.loads(call(*words, *more).stdout)["features"] == features


def test_speeds_read_back_as_they_were_written_and_older_records_load(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(profile, "record_path", lambda _: tmp_path / "speeds.json")
    assert profile.kept_speeds("pocket") is None
    train = {"a/b": TrainSpeed(0.1, 0.04, 0.01, 0.02, 0.3, 0.4)}
    speeds = Speeds("here", 1.0, 0.001, 0.0002, 0.01, 0.02, 0.001, [5, 6], train=train)
    record = asdict(speeds)
    profile.write_json(tmp_path / "speeds.json", record)
    assert profile.kept_speeds("pocket") == speeds
    # Version 0.2 also timed the quickstart's evaluation, and counted tokens that nothing used.
    older = record | {"prompts": [3, 4], "methods": {"plain": 0.01}}
    older["train"] = {"a/b": record["train"]["a/b"] | {"tokens": 400.0}}
    del older["stretch"]
    profile.write_json(tmp_path / "speeds.json", older)
    assert profile.kept_speeds("pocket") == speeds


@pytest.mark.parametrize(
    ("rounds", "line"),
    [
        ([(8, 0.05), (4, 0.03), (2, 0.02)], (0.01, 0.005)),
        ([(8, 0.05)], (0.05, 0.0)),
        ([(8, 0.04), (4, 0.02), (4, 0.02)], (0.0, 0.005)),
        # More rows in flight are never cheaper, and no round is free: the mean, then.
        ([(8, 0.02), (4, 0.04)], (0.03, 0.0)),
        ([(8, 0.09), (4, 0.03)], (0.0, 0.01)),
    ],
)
def test_line_through_rounds_is_the_least_squares_one_unless_a_part_of_it_is_below_zero(
    rounds: list[tuple[int, float]], line: tuple[float, float]
):
    assert profile.line_through(rounds) == pytest.approx(line, abs=1e-12)


def test_rounds_are_timed_apart_from_the_prefills(llama_dir: Path, monkeypatch):
    """A clock that ticks once at every look."""
    target = Target.from_pretrained(llama_dir, dtype="float32", device="cpu")
    ticks = iter(range(1000))
    monkeypatch.setattr(profile, "clock", lambda device: float(next(ticks)))
    requests = [Request([5, 6, 7 + i], 6 + 2 * i, i, str(i), Sampling(1.0)) for i in range(3)]
    answers, prefills, rounds = profile._timed(target, requests, slots=2)
    assert {g.key: len(g.token_ids) for g in answers} == {"0": 6, "1": 8, "2": 10}
    assert prefills == [1.0] * 3
    # Two rows until the first answer ends, two again once the third prompt has its slot, and one at the end.
    assert rounds == [(2, 1.0)] * 7 + [(1, 1.0)] * 7


@pytest.mark.parametrize(("load", "warned"), [(0.4, False), (7.9, False), (8.0, True)])
def test_a_busy_machine_is_reported_before_it_is_measured(
    load: float, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setattr("deepspec.planning.kept_speeds", lambda _: None)
    speeds = made_up_speeds(load_recipe("pocket-dspark"))
    monkeypatch.setattr("deepspec.planning.measure", lambda *_, **__: speeds)
    monkeypatch.setattr("deepspec.cost.sizes.Need.fits", True)
    found = call("plan", "pocket-dspark", "--data", write_rows(tmp_path / "few.jsonl", [("q", None)]))
    assert found.exit_code == 0, found.output
    assert ("--measure measures again" in " ".join(found.stderr.split())) == warned


def measured_plan(recipe: Recipe, speeds: Speeds, **choices: Any) -> Any:
    config, counts = TargetSpec.from_pretrained("pocket").config, assumed_counts(100, 50, 60)
    inputs = Inputs(recipe, config, counts, MACHINES["laptop-cpu"], describe, **choices)
    return make_plan(inputs, Measured(speeds))


def test_plan_measured_on_a_busy_machine_says_so():
    recipe = load_recipe("pocket-dspark")
    for share, noted in ((0.95, False), (0.2, True)):
        plan = measured_plan(recipe, replace(made_up_speeds(recipe), share=share))
        assert any("20% of a core" in note for note in plan.notes) == noted


def test_measured_plan_with_a_cache_runs_the_target_once_and_not_in_the_steps():
    recipe = load_recipe("pocket-dspark", ["optim.max_minutes=null", "optim.epochs=3"])
    speeds = made_up_speeds(recipe)
    online, cached = (
        measured_plan(recipe, speeds, features=source).sections["time"] for source in ("online", "cache")
    )
    steps = 3 * 100 / recipe.optim.batch_size
    assert online["training"].value == cached["training"].value == pytest.approx(steps * (0.05 - 0.02))
    assert online["features"].value == pytest.approx(steps * 0.02)
    assert cached["features"].value == pytest.approx(100 * (50 + 60) * 0.0002 + 100 * 0.001)
    # Encoding moves from the training's beginning to the cache's.
    before, after = (found["loading, setup and checkpoints"].value for found in (online, cached))
    assert before - after == pytest.approx(100 * 0.001)


def test_measured_answers_take_their_prefills_and_their_rounds():
    """Five answers of 60 tokens in 48 slots: five prefills, and 59 rounds of five rows."""
    recipe = load_recipe("pocket-dspark")
    inputs = Inputs(recipe, QWEN3_4B, assumed_counts(5, 50, 60), MACHINES["laptop-cpu"], describe, batch=48)
    found = Measured(made_up_speeds(recipe)).answers(inputs)
    assert found.value == pytest.approx(5 * 0.01 + 59 * 0.02 + 5 * 59 * 0.001)


def made_up_speeds(recipe: Recipe) -> Speeds:
    train = {speed_key(recipe): TrainSpeed(0.05, 0.02, 0.01, 0.02, 0.3, 0.4)}
    return Speeds("here", 1.0, 0.001, 0.0002, 0.01, 0.02, 0.001, [60] * 8, train=train)
