"""Lean steps against transformers' own passes, and which decoders may not take them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import DEVICE, SHAPE, tiny_model
from deepspec.targets import Target, TargetSpec
from deepspec.targets.anatomy import fuse_norms
from sequences import Sequences

LAYERS = (-1, 0, 2)
LONG = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0} | {
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


SCALED = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.5, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
"""Positions of Ministral 3, whose queries grow past the first sixteen tokens: a few do not show it."""


def built(kind: str, dtype: torch.dtype = torch.float32, **facts: Any) -> Target:
    config = AutoConfig.for_model(kind, **(SHAPE | dict(vocab_size=64, max_position_embeddings=4096) | facts))
    model = tiny_model(lambda: AutoModelForCausalLM.from_config(config)).to(DEVICE, dtype)
    return Target(TargetSpec(kind, config.to_dict()), model)


def stepped(target: Target, slot: int, ids: list[int]) -> Any:
    target.open(slot)
    found = target.step([slot], [ids], LAYERS)
    target.free(slot)
    return found


@pytest.fixture(scope="module")
def models() -> dict[str, Target]:
    return {
        "llama": built("llama", num_key_value_heads=4),
        "biases": built("qwen2"),
        "head norms": built("qwen3", head_dim=16),
        "one key head": built("qwen3", num_key_value_heads=1),
        "scaled positions": built("llama", rope_parameters=LONG),
        "output bias": built("llama", attention_bias=True),
        "no window": built("mistral", sliding_window=None),
    }


@settings(max_examples=14, deadline=None)
@given(
    name=st.sampled_from(
        ["llama", "biases", "head norms", "one key head", "scaled positions", "output bias", "no window"]
    ),
    pieces=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=4),
    slots=st.permutations(range(4)),
)
def test_ragged_lean_steps_equal_whole_passes_of_transformers(
    models: dict[str, Target], name: str, pieces: list[list[int]], slots: list[int]
) -> None:
    """A wrong place, mask or position would move the numbers by far more than rounding does."""
    sequences = Sequences(models[name], LAYERS, seed=len(pieces))
    for slot in slots[: len(pieces)]:
        sequences.reopen(slot)
    for turn in range(3):
        new = {s: p[turn] for s, p in zip(slots, pieces, strict=False) if turn < len(p)}
        if new:
            sequences.assert_step(new)


def test_every_kind_of_these_models_takes_lean_steps(models: dict[str, Target]) -> None:
    assert all(target._lean is not None for target in models.values())


def test_whole_rows_read_through_lean_layers_are_the_modules_own(models: dict[str, Target]) -> None:
    """What a GPU's features are made of; on a CPU, rows are read through transformers' modules."""
    draw = torch.Generator().manual_seed(2)
    for name, target in models.items():
        ids = torch.randint(64, (3, 37), generator=draw)
        assert target._lean is not None
        last, features = target._lean.read(ids, LAYERS)
        right = target.read(ids, LAYERS)
        near = {"rtol": 1e-4, "atol": 1e-4, "msg": lambda text, name=name: f"{name}: {text}"}
        torch.testing.assert_close(last, right.last_hidden, **near)
        torch.testing.assert_close(features, right.features, **near)
        assert target._lean.read(ids, ())[1] is None


def test_tokens_past_the_first_table_of_positions(models: dict[str, Target]) -> None:
    target = models["llama"]
    ids = torch.randint(64, (1500,), generator=torch.Generator().manual_seed(1)).tolist()
    target.open(0)
    parts = [target.step([0], [piece], LAYERS).last_hidden[0] for piece in (ids[:1000], ids[1000:])]
    target.free(0)
    whole = target.read(torch.tensor([ids]), LAYERS).last_hidden[0]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "facts"),
    [
        ("mistral", {"sliding_window": 16}),
        ("granite", {"residual_multiplier": 0.5}),
        ("gemma2", {"head_dim": 8, "layer_types": ["full_attention"] * 4}),
        ("llama", {"mlp_bias": True}),
        ("mixtral", {"sliding_window": None}),
        ("olmo2", {}),
        ("ministral3", {"rope_parameters": SCALED}),
    ],
)
def test_decoders_of_another_kind_keep_the_general_path(kind: str, facts: dict[str, Any]) -> None:
    """A window, a factor, a cap or experts that lean steps do not know would change numbers in silence."""
    target = built(kind, **facts)
    ids = list(range(20, 50))
    found = stepped(target, 0, ids)
    assert target._lean is None
    whole = target.read(torch.tensor([ids]), LAYERS)
    torch.testing.assert_close(found.last_hidden, whole.last_hidden, rtol=1e-4, atol=1e-4)


def test_numbers_that_are_not_reproduced_refuse_the_lean_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A family may compute with the same modules in another way."""
    target = built("llama")
    layer = target.decoder.layers[2]
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *a, **k: forward(*a, **k) * 1.01)
    stepped(target, 0, [5, 6, 7])
    assert target._lean is None


def test_half_precision_is_taken_within_its_rounding() -> None:
    target = built("qwen3", torch.bfloat16)
    stepped(target, 0, [5, 6, 7])
    assert target._lean is not None


def test_weights_stay_one_copy_that_modules_and_lean_steps_share() -> None:
    """Fused copies would double the memory, and a change of the model's weights would be missed."""
    target = built("llama")
    before = {k: v.clone() for k, v in target.model.state_dict().items()}
    first = stepped(target, 0, [5, 6, 7]).last_hidden
    assert all(torch.equal(v, before[k]) for k, v in target.model.state_dict().items())
    attention = target.decoder.layers[0].self_attn
    fused = target._lean.stack.layers[0].qkv
    # Inference tensors, which a step makes, may not take part in anything that is differentiated.
    assert not attention.k_proj.weight.is_inference()
    assert attention.k_proj.weight.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()
    with torch.no_grad():
        attention.v_proj.weight.mul_(2)
    changed = stepped(target, 0, [5, 6, 7]).last_hidden
    assert not torch.equal(changed, first)
    torch.testing.assert_close(changed, target.read(torch.tensor([[5, 6, 7]]), ()).last_hidden)


def test_hooks_on_the_decoder_are_called_in_the_middle_of_a_sequence() -> None:
    """Both paths keep the same keys and values, so a step may take either."""
    target = built("qwen3")
    ids, calls = list(range(12)), []
    target.open(0)
    parts = [target.step([0], [ids[:5]]).last_hidden]
    hook = target.decoder.register_forward_hook(lambda *what: calls.append(1))
    parts.append(target.step([0], [ids[5:9]]).last_hidden)
    hook.remove()
    parts.append(target.step([0], [ids[9:]]).last_hidden)
    assert calls == [1]
    whole = target.read(torch.tensor([ids]), ()).last_hidden
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "fused"), [("llama", True), ("qwen3", True), ("gemma2", False)])
def test_norms_of_llama_s_kind_are_fused_without_another_number(kind: str, fused: bool) -> None:
    """On an accelerator. Gemma's add one to their weights, and round elsewhere."""
    target = built(kind, torch.bfloat16)
    norms = [module for module in target.decoder.modules() if hasattr(module, "variance_epsilon")]
    ids = torch.arange(40, 60)[None]
    for norm in norms:
        norm.weight.data = torch.randn_like(norm.weight)
        vars(norm).pop("forward", None)  # fused already, on an accelerator
    before = target.read(ids, LAYERS)
    fuse_norms(target.decoder)
    changed = [module for module in target.decoder.modules() if "forward" in vars(module)]
    assert changed == (norms if fused else [])
    after = target.read(ids, LAYERS)
    assert torch.equal(before.last_hidden, after.last_hidden)
    assert torch.equal(before.features, after.features)
