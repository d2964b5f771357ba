"""Every family of targets against transformers itself, on tiny random weights.

`docs/targets.md` is written from what these tests find: `make docs` rewrites it, and the last test fails
where the page says something else.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import deepspec
import deepspec.targets.loading as room
import deepspec.train.loop as training
from conftest import MODELS, SLIDING_WINDOW, prompts_of, save_tiny
from conftest import SHAPE as TINY
from deepspec import families
from deepspec.checkpoints.draft import load_draft
from deepspec.config import Recipe
from deepspec.data.tokens import Encoded
from deepspec.errors import TargetError
from deepspec.targets import Target, TargetSpec
from sequences import assert_scripted_steps
from talking import recipe_tree, train_in

PAGE = Path(__file__).parent.parent / "docs" / "targets.md"
WRITE = "DEEPSPEC_WRITE_DOCS"
CHECKS = ("features", "logits", "roll-back", "train", "eval")

LEAN = {"Llama", "Qwen3"}
"""Families whose steps are those of `targets/lean.py`; the others are called module by module."""

# ── tiny configs ──────────────────────────────────────────────────────────────────────────────────────

SLIDING, FULL, CHUNKED, LINEAR = (
    "sliding_attention",
    "full_attention",
    "chunked_attention",
    "linear_attention",
)
SHAPE: dict[str, Any] = TINY | dict(
    vocab_size=64,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
WINDOW: dict[str, Any] = dict(sliding_window=SLIDING_WINDOW, layer_types=[SLIDING, SLIDING, FULL, SLIDING])
HEAD: dict[str, Any] = dict(head_dim=8)
EXPERTS: dict[str, Any] = dict(num_experts_per_tok=2, moe_intermediate_size=24)
ROUTED: dict[str, Any] = dict(n_routed_experts=4, first_k_dense_replace=1, **EXPERTS)
LATENT: dict[str, Any] = dict(
    q_lora_rank=16,
    kv_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=6,
    num_key_value_heads=4,
)
DELTA: dict[str, Any] = dict(
    layer_types=[LINEAR, FULL, LINEAR, FULL],
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_conv_kernel_dim=3,
)
MAMBA: dict[str, Any] = dict(mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8)
GRANITE: dict[str, Any] = dict(
    embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.3
)

# name on the page -> (model_type, facts beside SHAPE)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama 4": (
        "llama4_text",
        dict(
            attention_chunk_size=SLIDING_WINDOW,
            layer_types=[CHUNKED, CHUNKED, FULL, CHUNKED],
            no_rope_layers=[1, 1, 0, 1],
            num_local_experts=4,
            num_experts_per_tok=1,
            intermediate_size_mlp=48,
            **HEAD,
        ),
    ),
    "Mistral": ("mistral", dict(sliding_window=SLIDING_WINDOW)),
    "Mixtral": ("mixtral", dict(num_local_experts=4)),
    "Qwen2": ("qwen2", dict(use_sliding_window=True, sliding_window=SLIDING_WINDOW, max_window_layers=2)),
    "Qwen2-MoE": ("qwen2_moe", dict(num_experts=4, shared_expert_intermediate_size=24, **EXPERTS)),
    "Qwen3": ("qwen3", HEAD),
    "Qwen3-MoE": ("qwen3_moe", dict(num_experts=4, **HEAD, **EXPERTS)),
    "Qwen3-Next": (
        "qwen3_next",
        dict(num_experts=4, shared_expert_intermediate_size=24, **HEAD, **EXPERTS, **DELTA),
    ),
    "Qwen3.5": ("qwen3_5_text", HEAD | DELTA),
    "Gemma 2": ("gemma2", dict(final_logit_softcapping=2.5, **HEAD, **WINDOW)),
    "Gemma 3": ("gemma3_text", HEAD | WINDOW),
    "Gemma 4": ("gemma4_text", {}),
    "Phi": ("phi", {}),
    "Phi-3, Phi-4": ("phi3", dict(sliding_window=SLIDING_WINDOW)),
    "OLMo": ("olmo", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", WINDOW),
    "gpt-oss": ("gpt_oss", dict(num_local_experts=4, num_experts_per_tok=2, **HEAD, **WINDOW)),
    "GLM": ("glm", HEAD),
    "GLM-4": ("glm4", HEAD),
    "GLM-4 MoE": ("glm4_moe", HEAD | ROUTED),
    "DeepSeek-V3": ("deepseek_v3", dict(n_group=2, topk_group=1, **ROUTED, **LATENT)),
    # Many index heads: with few, rectified scores tie at zero, and which key a tie takes is up to the kernel.
    "DeepSeek-V3.2": (
        "deepseek_v32",
        dict(n_group=2, topk_group=1, index_n_heads=16, index_head_dim=8, index_topk=6, **ROUTED, **LATENT),
    ),
    "Cohere": ("cohere", dict(logit_scale=0.25)),
    "Cohere 2": ("cohere2", dict(logit_scale=0.25, **WINDOW)),
    "Granite": ("granite", GRANITE),
    "Granite 4 hybrid": (
        "granitemoehybrid",
        dict(
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=["mamba", "attention"] * 2,
            shared_intermediate_size=24,
            **GRANITE,
            **MAMBA,
        ),
    ),
    "MiniCPM3": ("minicpm3", dict(scale_emb=3.0, dim_model_base=16, scale_depth=1.4, **LATENT)),
    "Falcon-H1": (
        "falcon_h1",
        dict(embedding_multiplier=3.0, lm_head_multiplier=0.5, mamba_d_ssm=64, **HEAD, **MAMBA),
    ),
    "LFM2": ("lfm2", dict(layer_types=["conv", FULL] * 2)),
    "Jamba": (
        "jamba",
        dict(
            attn_layer_period=2, attn_layer_offset=1, num_experts=4, mamba_d_state=8, use_mamba_kernels=False
        ),
    ),
    "Nemotron-H": (
        "nemotron_h",
        dict(
            hybrid_override_pattern="M*M-",
            mamba_num_heads=4,
            mamba_head_dim=16,
            n_groups=1,
            ssm_state_size=8,
            **HEAD,
        ),
    ),
}


def tiny(model_type: str, facts: dict[str, Any]) -> PreTrainedModel:
    if model_type == "gemma4_text":
        return MODELS["gemma4"]()
    config = AutoConfig.for_model(model_type, **{**SHAPE, **facts})
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Target]:
    """A family's target, saved and loaded once for all its checks."""

    @functools.cache
    def loaded(name: str) -> Target:
        path = tmp_path_factory.mktemp("family")
        save_tiny(lambda: tiny(*FAMILIES[name]), path)
        return Target.from_pretrained(path, dtype="float32", device="cpu")

    return loaded


FOUND: dict[str, dict[str, str]] = {}
REFUSED: dict[str, str] = {}
"""What the page is written from."""


@contextmanager
def finding(name: str, check: str) -> Iterator[None]:
    """Writes down whether a check of a family held."""
    FOUND.setdefault(name, {"steps": "?"})[check] = "no"
    yield
    FOUND[name][check] = "yes"


each_family = pytest.mark.parametrize("name", FAMILIES)
TRAINED: dict[str, tuple[str, ...]] = {
    name: ("eagle3", "dspark")[i % 2 :][:1] for i, name in enumerate(FAMILIES)
} | {"Gemma 4": ("eagle3", "dspark")}
"""What is trained on each family, in turn: all drafts but Gemma 4's have the same shape of layers."""

# ── one pass ──────────────────────────────────────────────────────────────────────────────────────────


@each_family
def test_features_are_the_hidden_states_of_transformers_factors_included(
    load: Callable[[str], Target], name: str
) -> None:
    """-1 is the scaled embedding in families that scale it outside of the embedding module."""
    with finding(name, "features"):
        target = load(name)
        ids = torch.tensor(prompts_of(target, [19, 19]))
        with torch.no_grad():
            theirs = target.model(ids, output_hidden_states=True).hidden_states
        layers = range(-1, target.spec.num_layers - 1)
        found = target.read(ids, layers)
        assert torch.equal(found.features, torch.cat(theirs[:-1], dim=-1))
        assert torch.equal(found.last_hidden, theirs[-1])
        assert torch.equal(target.embedding(ids), theirs[0])


@each_family
def test_head_repeats_scale_bias_and_cap_of_the_family(load: Callable[[str], Target], name: str) -> None:
    with finding(name, "logits"):
        target = load(name)
        ids = torch.tensor(prompts_of(target, [19, 19]))
        with torch.no_grad():
            theirs = target.model(ids).logits
        ours = target.logits(target.read(ids, []).last_hidden)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# ── slots ─────────────────────────────────────────────────────────────────────────────────────────────


@each_family
def test_ragged_steps_and_rollback_equal_whole_passes(load: Callable[[str], Target], name: str) -> None:
    """Windows, sinks, latent keys and running states: what was rolled back leaves no trace."""
    with finding(name, "roll-back"):
        target = load(name)
        assert_scripted_steps(target)
    FOUND[name]["steps"] = "new tokens" if target.cached else "whole sequence"


@pytest.mark.parametrize("name", ["gpt-oss", "Gemma 2"])
def test_eager_families_are_not_given_boolean_masks(load: Callable[[str], Target], name: str) -> None:
    """Neither sinks nor capped scores exist in the fused kernel, and eager attention adds its mask."""
    assert load(name).model.config._attn_implementation == "eager"


def test_hybrids_are_the_ones_read_anew(load: Callable[[str], Target]) -> None:
    """A running state taken for keys by position would survive the rollback."""
    hybrid = {"Qwen3-Next", "Qwen3.5", "Granite 4 hybrid", "Falcon-H1", "LFM2", "Jamba", "Nemotron-H"}
    # Llama 4 tunes its attention by one position for all rows; DeepSeek-V3.2 keeps an index beside its keys.
    other = {"Llama 4", "DeepSeek-V3.2"}
    assert {name for name in FAMILIES if not load(name).cached} == hybrid | other


def test_dense_llamas_take_lean_steps(load: Callable[[str], Target]) -> None:
    """Others (windows, experts, factors between the layers, norms of their own) take transformers' path."""
    taken = set()
    for name in FAMILIES:
        target = load(name)
        target.open(0)
        target.step([0], [[3, 5, 7]])
        target.free(0)
        if target._lean is not None:
            taken.add(name)
    assert taken == LEAN


# ── training and evaluation ───────────────────────────────────────────────────────────────────────────


def recipe_for(algorithm: str) -> Recipe:
    tree = recipe_tree(Path("unused"), Path("unused"), algorithm, max_steps=3)
    tree["draft"] |= {"block": 3, "target_layer_ids": [-1, 0, 2]}
    tree |= {"num_anchors": 4, "eval_every_steps": 100, "checkpoint_every_steps": 100}
    return Recipe.model_validate(tree)


@pytest.fixture(scope="module")
def train(load: Callable[[str], Target], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The run of a family's draft, trained once."""

    @functools.cache
    def trained(name: str, algorithm: str) -> Path:
        target, run = load(name), tmp_path_factory.mktemp("run")
        rows = [
            Encoded(ids=ids, loss_mask=[0] * 3 + [1] * (len(ids) - 3), id=str(i))
            for i, ids in enumerate(prompts_of(target, [12, 14, 9, 15]))
        ]
        train_in(run, recipe_for(algorithm), target, rows)
        return run

    return trained


@each_family
def test_drafts_train_on_every_family(
    load: Callable[[str], Target], train: Callable[..., Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Head dimensions, experts and factors of the target must not find their way into the draft's shape."""
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    with finding(name, "train"):
        for algorithm in TRAINED[name]:
            run = train(name, algorithm)
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
            losses = [row["loss"] for row in rows]
            assert len(losses) == 3 and losses[-1] < losses[0], (algorithm, losses)


@each_family
def test_drafted_tokens_are_the_targets_own(
    load: Callable[[str], Target], train: Callable[..., Path], name: str
) -> None:
    """A trained draft, loaded from its checkpoint: ragged greedy decoding gives what transformers would."""
    with finding(name, "eval"):
        target = load(name)
        prompts = prompts_of(target, [8, 3], seed=5)
        plain = [g.token_ids for g in deepspec.generate(target, None, prompts, 5, ignore_eos=True)]
        for prompt, new in zip(prompts, plain, strict=True):
            with torch.no_grad():
                logits = target.model(torch.tensor([[*prompt, *new]])).logits[0]
            assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == new
        for algorithm in TRAINED[name]:
            draft = load_draft(train(name, algorithm), target)
            found = deepspec.generate(target, draft, prompts, 5, ignore_eos=True)
            assert [g.token_ids for g in found] == plain, algorithm
            assert all(g.committed_per_round for g in found)


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────

CANNOT: dict[str, tuple[str, dict[str, Any], str]] = {
    "T5": ("t5", dict(d_model=16, num_layers=2, d_ff=16, num_heads=2), "is an encoder-decoder"),
    "Mamba": ("mamba", dict(state_size=8), "state-space"),
    "Mamba 2": ("mamba2", dict(num_heads=4, head_dim=16, n_groups=1, state_size=8), "state-space"),
    "GPT-2": ("gpt2", dict(n_embd=32, n_layer=2, n_head=2), "could not find the decoder's layers"),
    "BERT": ("bert", dict(is_decoder=True), "could not find the decoder's layers"),
    "Gemma 3n": (
        "gemma3n_text",
        dict(hidden_size_per_layer_input=4, vocab_size_per_layer_input=64, num_kv_shared_layers=0, **HEAD),
        "not one residual stream",
    ),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_be_right_is_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    model_type, facts, reason = CANNOT[name]
    if model_type == "t5":
        AutoConfig.for_model(model_type, **facts).save_pretrained(tmp_path)
    else:
        save_tiny(lambda: tiny(model_type, facts), tmp_path)
    with pytest.raises(TargetError) as caught:
        target = Target.from_pretrained(tmp_path, dtype="float32", device="cpu")
        target.read(torch.tensor([[5, 6, 7]]), [0])
    assert reason in caught.value.what
    assert caught.value.next_step
    REFUSED[name] = caught.value.what.replace(str(tmp_path), "the target")


def test_positions_that_turn_with_the_length_are_refused_past_it(tmp_path: Path) -> None:
    """Keys stored with the short frequencies would be read with the long ones, and rows would depend on each
    other's lengths."""
    rope = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4)
    facts = dict(rope_parameters=rope, original_max_position_embeddings=12)
    save_tiny(lambda: tiny("phi3", facts), tmp_path)
    target = Target.from_pretrained(tmp_path, dtype="float32", device="cpu")
    target.open(0)
    target.step([0], [[1] * 12])
    for attempt in (lambda: target.step([0], [[1]]), lambda: target.read(torch.ones(1, 13).long(), [])):
        with pytest.raises(TargetError, match="past 12 its rotary frequencies change") as caught:
            attempt()
        assert "within 12 tokens" in str(caught.value)
    assert target.length(0) == 12


def test_unknown_factor_on_the_logits_is_found_on_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family that nobody prepared must not be trained against a distribution that is not its own."""
    save_tiny(lambda: tiny(*FAMILIES["Granite"]), tmp_path)
    monkeypatch.delitem(families.TARGET_FAMILIES, "granite")
    with pytest.raises(TargetError, match="'granite' model are not its head times") as caught:
        Target.from_pretrained(tmp_path, dtype="float32", device="cpu")
    assert "logit_factor" in str(caught.value)


# ── configs, quantised and spread-out models ──────────────────────────────────────────────────────────


def test_facts_that_a_config_file_leaves_to_its_class_are_filled_in(tmp_path: Path) -> None:
    """Published Gemma-3 files name neither the vocabulary nor the heads of their text part."""
    text = {"model_type": "gemma3_text", "hidden_size": 640, "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}), "utf-8")
    spec = TargetSpec.from_pretrained(str(tmp_path))
    assert (spec.model_type, spec.hidden_size, spec.num_layers) == ("gemma3_text", 640, 4)
    assert (spec.vocab_size, spec.config["num_attention_heads"], spec.config["head_dim"]) == (262_208, 8, 256)


def test_text_part_of_a_multimodal_model_is_the_target(tmp_path: Path) -> None:
    """Its layers, cap and window are the text part's, whatever the wrapper's config says."""
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    facts = dict(
        text_config=SHAPE | HEAD | WINDOW,
        vision_config=dict(vision, image_size=16, patch_size=8),
        mm_tokens_per_image=1,
        image_token_index=60,
        boi_token_index=61,
        eoi_token_index=62,
    )
    save_tiny(lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma3", **facts)), tmp_path)
    target = Target.from_pretrained(tmp_path, dtype="float32", device="cpu")
    assert (type(target.model).__name__, target.spec.model_type) == (
        "Gemma3ForConditionalGeneration",
        "gemma3_text",
    )
    ids = torch.tensor(prompts_of(target, [19]))
    with torch.no_grad():
        theirs = target.model(ids)
    ours = target.logits(target.read(ids, []).last_hidden)
    torch.testing.assert_close(ours, theirs.logits, atol=1e-5, rtol=1e-5)
    assert_scripted_steps(target)


class Dispatched(torch.nn.Module):
    """Stands for a model that transformers has placed: it refuses to be moved."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.inner = model

    def __getattr__(self, name: str) -> Any:
        return getattr(super().__getattr__("inner"), name) if name != "inner" else super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a dispatched model cannot be moved")


@pytest.mark.parametrize("quantised", [True, False])
def test_placed_models_are_not_moved_again(
    target_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantised: bool
) -> None:
    config = json.loads((target_dirs["llama"] / "config.json").read_text("utf-8"))
    if quantised:
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    asked: dict[str, Any] = {}
    model = AutoModelForCausalLM.from_pretrained(target_dirs["llama"], dtype=torch.float32)

    def from_pretrained(path: str, **options: Any) -> Any:
        asked.update(options)
        return Dispatched(model), {"missing_keys": set()}

    monkeypatch.setattr(room.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(room, "find_spec", lambda name: object())
    target = Target.from_pretrained(tmp_path, device="cpu", device_map=None if quantised else "auto")
    assert asked["device_map"] == ({"": "cpu"} if quantised else "auto")
    assert target.spec.quantised == quantised
    assert_scripted_steps(target)


def test_missing_accelerate_is_named(target_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "find_spec", lambda name: None)
    with pytest.raises(TargetError, match="accelerate"):
        Target.from_pretrained(target_dirs["llama"], device_map="auto")


@pytest.mark.parametrize("part", ["head", "embedding"])
def test_quantised_head_or_embedding_cannot_be_shared(target_dirs: dict[str, Path], part: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(target_dirs["llama"], dtype=torch.float32)
    module = model.get_output_embeddings() if part == "head" else model.get_input_embeddings()
    module.weight = torch.nn.Parameter(module.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TargetError, match=f"the {part} of .* is quantised .float8_e4m3fn."):
        Target(TargetSpec.from_pretrained(str(target_dirs["llama"])), model)


# ── the page ──────────────────────────────────────────────────────────────────────────────────────────


def page() -> str:
    """The page with its tables replaced by what was found."""
    families = [
        ["family", "`model_type`", *CHECKS, "a step reads"],
        *(
            [name, f"`{kind}`", *(FOUND[name][check] for check in CHECKS), FOUND[name]["steps"]]
            for name, (kind, _) in FAMILIES.items()
        ),
    ]
    refused = [["family", "`model_type`", "reason"]]
    refused += [[name, f"`{CANNOT[name][0]}`", reason] for name, reason in REFUSED.items()]
    text = PAGE.read_text("utf-8")
    for mark, rows in (("families", families), ("refused", refused)):
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "|---" * len(rows[0]) + "|")
        before, rest = text.split(f"<!-- {mark} -->")
        after = rest.split(f"<!-- /{mark} -->")[1]
        text = f"{before}<!-- {mark} -->\n" + "\n".join(lines) + f"\n<!-- /{mark} -->{after}"
    return text


def test_targets_page_says_what_these_tests_found() -> None:
    if any(FOUND.get(name, {}).keys() < {*CHECKS, "steps"} for name in FAMILIES) or len(REFUSED) < len(
        CANNOT
    ):
        pytest.skip("only some of the checks ran")
    found = page()
    if os.environ.get(WRITE):
        PAGE.write_text(found, "utf-8")
    assert PAGE.read_text("utf-8") == found, "docs/targets.md is not what was found: run `make docs`"
