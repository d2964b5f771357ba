"""The target room against `transformers` itself: features, heads, and cached steps over ragged slots."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma4ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as hf_logging

from conftest import DEVICE, FAMILIES, MODELS, SLIDING_WINDOW, prompts_of, save_tiny
from deepspec.checkpoints.read import find_checkpoint
from deepspec.decode.engine import generate
from deepspec.errors import CheckpointError, TargetError
from deepspec.families import context_length
from deepspec.targets import Target, TargetSpec
from sequences import CLOSE, Sequences, assert_scripted_steps


@pytest.fixture(params=FAMILIES)
def target(request: pytest.FixtureRequest, targets: dict[str, Target]) -> Target:
    return targets[request.param]


def load(path: Path) -> Target:
    return Target.from_pretrained(path, dtype="float32", device=DEVICE)


# ── features, hidden states, head ─────────────────────────────────────────────────────────────────────


def test_every_feature_is_the_residual_stream_after_its_layer(target: Target) -> None:
    ids = torch.tensor(prompts_of(target, [19, 19]), device=DEVICE)
    with torch.no_grad():
        theirs = target.model(ids, output_hidden_states=True)
    depth = target.spec.num_layers
    assert len(theirs.hidden_states) == depth + 1
    for layer in range(-1, depth - 1):
        found = target.read(ids, [layer])
        assert torch.equal(found.features, theirs.hidden_states[layer + 1]), f"layer {layer}"


def test_features_are_joined_in_the_order_asked_for(target: Target) -> None:
    ids = torch.tensor(prompts_of(target, [9]))
    last, first = target.read(ids, [2]).features, target.read(ids, [-1]).features
    joined = target.read(ids, [2, -1]).features
    assert torch.equal(joined, torch.cat([last, first], dim=-1))


def test_no_layers_means_no_features(target: Target) -> None:
    assert target.read(torch.tensor([[1, 2, 3]]), [0]).features is not None
    assert target.read(torch.tensor([[1, 2, 3]]), []).features is None


def test_last_hidden_is_after_the_final_norm(target: Target) -> None:
    ids = torch.tensor(prompts_of(target, [15]), device=DEVICE)
    with torch.no_grad():
        theirs = target.model(ids, output_hidden_states=True).hidden_states[-1]
        before = target.read(ids, [target.spec.num_layers - 2]).features
    found = target.read(ids, []).last_hidden
    assert torch.equal(found, theirs)
    assert not torch.allclose(found, before)


def test_head_gives_the_models_logits_soft_cap_included(target: Target) -> None:
    ids = torch.tensor(prompts_of(target, [15]), device=DEVICE)
    with torch.no_grad():
        theirs = target.model(ids).logits
    ours = target.logits(target.read(ids, []).last_hidden)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert target.vocab_size == theirs.shape[-1]


def test_the_soft_cap_of_the_gemma_target_bites(targets: dict[str, Target]) -> None:
    target = targets["gemma4"]
    hidden = target.read(torch.tensor(prompts_of(target, [15])), []).last_hidden
    bare = hidden @ target.head.weight.T
    assert (bare - target.logits(hidden)).abs().max() > 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embedding_repeats_the_models_scale_and_its_rounding(
    target_dirs: dict[str, Path], dtype: str
) -> None:
    target = Target.from_pretrained(target_dirs["gemma4"], dtype=dtype, device=DEVICE)
    ids = torch.arange(target.vocab_size, device=DEVICE)
    assert target.embedding.scale != 1
    assert torch.equal(target.embedding(ids), target.model.get_input_embeddings()(ids))
    assert target.dtype == getattr(torch, dtype)


def test_padding_to_the_right_changes_nothing_before_it(target: Target) -> None:
    short, long = prompts_of(target, [7, 21])
    alone = target.read(torch.tensor([short]), [0, 1])
    padded = target.read(torch.tensor([short + [0] * 14, long]), [0, 1])
    torch.testing.assert_close(padded.last_hidden[0, :7], alone.last_hidden[0], atol=CLOSE, rtol=0)
    torch.testing.assert_close(padded.features[0, :7], alone.features[0], atol=CLOSE, rtol=0)


def test_target_is_frozen_and_leaves_no_graph(target: Target) -> None:
    assert not target.model.training
    assert not any(p.requires_grad for p in target.model.parameters())
    assert not target.read(torch.tensor([[1, 2]]), [0]).features.requires_grad


# ── cached steps ──────────────────────────────────────────────────────────────────────────────────────


steps = st.dictionaries(st.integers(0, 3), st.integers(1, 9), min_size=1, max_size=4)
rollbacks = st.tuples(st.integers(0, 3), st.floats(0, 1))
operations = st.lists(st.one_of(steps, steps, rollbacks, st.integers(0, 3)), min_size=3, max_size=9)


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_cached_steps_with_rollback_equal_whole_passes(
    targets: dict[str, Target], family: str
) -> None:
    """Any sequence of steps over several slots (in any order, with different counts), rollbacks and reopened
    slots: what a step returns is what one pass over the tokens so far returns."""

    @settings(derandomize=True, deadline=None, max_examples=10, database=None)
    @given(operations)
    def check(todo: list[dict[int, int] | tuple[int, float] | int]) -> None:
        sequences = Sequences(targets[family])
        for operation in todo:
            if isinstance(operation, dict):
                sequences.assert_step(operation)
            elif isinstance(operation, tuple):
                sequences.rollback(*operation)
            else:
                sequences.reopen(operation)

    check()


def mistral() -> PreTrainedModel:
    """All layers slide, and the config has no layer types."""
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    return MistralForCausalLM(MistralConfig(sliding_window=SLIDING_WINDOW, **shape, **heads))


def gemma2() -> PreTrainedModel:
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, head_dim=8)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    return Gemma2ForCausalLM(Gemma2Config(sliding_window=SLIDING_WINDOW, **shape, **heads))


def gemma4_shared() -> PreTrainedModel:
    """The upper layers reuse the keys and values of lower ones, and each has an embedding of its own."""
    facts = {"num_kv_shared_layers": 3, "hidden_size_per_layer_input": 4}
    config = MODELS["gemma4"]().config.to_dict() | facts
    return Gemma4ForCausalLM(AutoConfig.for_model(**config))


OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "mistral": mistral,
    "gemma2": gemma2,
    "gemma4_shared": gemma4_shared,
}


@pytest.mark.parametrize("name", OTHERS)
def test_sliding_windows_hold_in_models_that_spell_them_differently(name: str, tmp_path: Path) -> None:
    """Older files leave the layer types out: a step must not fall back to full attention."""
    path = save_tiny(OTHERS[name], tmp_path / name)
    if name == "gemma2":
        config = json.loads((path / "config.json").read_text("utf-8"))
        del config["layer_types"]
        (path / "config.json").write_text(json.dumps(config), "utf-8")
    assert_scripted_steps(load(path))


def test_eager_attention_gets_its_mask_as_numbers(target_dirs: dict[str, Path]) -> None:
    """Eager attention adds the mask to its scores: a boolean one would only add one to what may be seen."""
    path = target_dirs["gemma4"]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    assert_scripted_steps(Target(TargetSpec.from_pretrained(str(path)), model.to(DEVICE)))


def test_rows_come_back_in_the_order_of_their_slots(target: Target) -> None:
    sequences = Sequences(target)
    sequences.assert_step({slot: 2 + slot for slot in range(4)})
    for order in ((0, 2, 1, 3), (3, 2, 1, 0), (1, 3), (3, 1), (2, 3)):
        sequences.assert_step({slot: 4 - slot for slot in order})


def test_growing_the_store_keeps_what_it_holds(target: Target) -> None:
    sequences = Sequences(target)
    sequences.assert_step({1: 40})
    sequences.assert_step({0: 5, 1: 3})
    sequences.assert_step({0: 2, 1: 7})
    sequences.assert_step({7: 130, 0: 4, 1: 1})
    sequences.assert_step({0: 1, 1: 2, 7: 3})


def test_a_failed_request_for_features_leaves_the_hooks_whole(target: Target) -> None:
    ids = torch.tensor([[1, 2, 3]])
    want = target.read(ids, [0, 1]).features
    with pytest.raises(TargetError):
        target.read(ids, [99])
    assert torch.equal(target.read(ids, [0, 1]).features, want)


# ── loading ───────────────────────────────────────────────────────────────────────────────────────────


def write_tokenizer(path: Path, eos: str | None) -> None:
    words = {"<eos>": 0, "<unk>": 1, "<turn>": 2, **{f"w{i}": i for i in range(3, 64)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, unk_token="<unk>").save_pretrained(
        path
    )


@pytest.mark.parametrize(
    ("tokenizer", "generation", "model", "expected"),
    [
        ("<eos>", [2, 5], 7, {0, 2, 5}),
        ("<turn>", [2, 5], 7, {2, 5}),
        (None, [2, 5], 7, {2, 5}),  # a tokenizer that names no end
        ("none", [2, 5], 7, {2, 5}),  # no tokenizer at all
        ("none", 5, 7, {5}),
        ("<eos>", None, None, {0}),
        ("<eos>", "no file", None, {0}),
        ("<eos>", "no file", 7, {0, 7}),
        (None, "no file", [7, 8], {7, 8}),
        (None, "no file", None, set()),
        (None, None, 7, set()),
    ],
)
def test_stop_tokens_are_the_tokenizers_and_the_generation_configs_each_by_itself(
    target_dirs: dict[str, Path],
    tmp_path: Path,
    tokenizer: str | None,
    generation: Any,
    model: Any,
    expected: set[int],
) -> None:
    path = tmp_path / "target"
    shutil.copytree(target_dirs["llama"], path)
    config = json.loads((path / "config.json").read_text("utf-8"))
    (path / "config.json").write_text(json.dumps(config | {"eos_token_id": model}), "utf-8")
    if tokenizer != "none":
        write_tokenizer(path, tokenizer)
    if generation == "no file":
        (path / "generation_config.json").unlink()
    else:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}), "utf-8")
    assert load(path).stop_token_ids == expected


def test_invented_tokenizer_ends_no_sentence(target_dirs: dict[str, Path]) -> None:
    """transformers invents an empty tokenizer for some families; its one token is no end of anything."""
    target = load(target_dirs["qwen3"])
    assert target.tokenizer is None
    assert target.stop_token_ids == frozenset()


@pytest.mark.parametrize("name", ["nowhere/at/all/of/it", "nowhere", "some-org/some-model"])
def test_missing_target_names_the_local_directory_form(name: str) -> None:
    with pytest.raises(TargetError) as caught:
        Target.from_pretrained(name)
    assert name in str(caught.value)
    assert "give a local directory" in str(caught.value)


@pytest.mark.parametrize("layers", [[-2], [0, 4], [0, 3], [99]])
def test_feature_layer_out_of_range_names_the_depth(targets: dict[str, Target], layers: list[int]) -> None:
    """3 is the last layer of the four: HF's own list holds its output after the norm only."""
    with pytest.raises(TargetError, match="which has 4 layers") as caught:
        targets["llama"].read(torch.tensor([[1]]), layers)
    assert "-1 (the embedding) to 2" in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "no-such-model"}'])
def test_unreadable_config_is_a_clear_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content, "utf-8")
    with pytest.raises(TargetError, match="is not a model that transformers can load"):
        Target.from_pretrained(tmp_path)


def test_torn_weights_are_named(target_dirs: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "torn"
    shutil.copytree(target_dirs["llama"], path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(TargetError, match="cannot be loaded: the file is torn") as caught:
        load(path)
    assert caught.value.where == str(weights)
    assert "download it again" in str(caught.value)


def test_torn_missing_and_unfetched_shards_are_named(target_dirs: dict[str, Path], tmp_path: Path) -> None:
    """transformers' own message names no file, or none that a user could act on."""
    path = tmp_path / "sharded"
    model = AutoModelForCausalLM.from_pretrained(target_dirs["llama"], dtype=torch.float32)
    model.save_pretrained(path, max_shard_size="20KB")
    shard = sorted(path.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    for content, expected in [
        (whole[:-8], "the file is torn"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (None, "a shard named in the index is missing"),
    ]:
        shard.unlink() if content is None else shard.write_bytes(content)
        with pytest.raises(TargetError, match=expected) as caught:
            load(path)
        assert caught.value.where == str(shard)
    shard.write_bytes(whole)
    assert load(path).spec.num_layers == model.config.num_hidden_layers


def test_weights_that_are_not_there_are_not_made_up(target_dirs: dict[str, Path], tmp_path: Path) -> None:
    """transformers fills them with random numbers and goes on: a target that nobody trained."""
    path = tmp_path / "partial"
    shutil.copytree(target_dirs["llama"], path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    lost = "model.layers.1.self_attn.q_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != lost}, file, metadata={"format": "pt"})
    with pytest.raises(TargetError, match=f"lacks 1 of the tensors .*{lost}"):
        load(path)


def test_code_that_comes_with_a_model_is_not_run(
    target_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to itself transformers asks on the terminal whether to run it, in the middle of `--json`."""
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked on the terminal"))
    path = tmp_path / "custom"
    shutil.copytree(target_dirs["llama"], path)
    config = json.loads((path / "config.json").read_text("utf-8"))
    config |= {"model_type": "no-such-model", "auto_map": {"AutoConfig": "code.Config"}}
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    (path / "code.py").write_text("raise SystemExit('it was run')", "utf-8")
    with pytest.raises(TargetError, match="needs modelling code from its own repository"):
        load(path)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"added_tokens": [], "model": {}}'])
def test_tokenizer_that_cannot_be_read_is_not_taken_for_none(
    content: str, target_dirs: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "tokens"
    shutil.copytree(target_dirs["llama"], path)
    (path / "tokenizer.json").write_text(content, "utf-8")
    with pytest.raises(TargetError, match="the tokenizer cannot be read") as caught:
        load(path)
    assert caught.value.where == str(path)


def test_path_of_a_file_or_a_mistyped_path_does_not_wait_for_the_hub(
    target_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(TargetError, match="is a file that is not GGUF"):
        load(target_dirs["llama"] / "config.json")
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("models/mistyped", "./mistyped", "/no/where", "a/b/c"):
        with pytest.raises(TargetError, match="there is no such directory or file") as caught:
            Target.from_pretrained(name)
        assert "--local-dir" in str(caught.value)


def hub_error(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    """As the Hub's client raises it."""
    request = httpx.Request("GET", "https://huggingface.co/org/model/resolve/main/config.json")
    return kind(f"{status} Client Error.", response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    "error, expected",
    [
        (hub_error(GatedRepoError, 403), "is gated on the Hub.*(?s:.*)accept its licence.*local directory"),
        (hub_error(RepositoryNotFoundError, 401), "no such repository, or it is private(?s:.*)--local-dir"),
        (LocalEntryNotFoundError("no"), "the Hub cannot be reached(?s:.*)--local-dir"),
    ],
)
def test_hub_id_that_cannot_be_had_says_why_and_what_to_do(
    error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Targets come through transformers, which wraps the client's errors; drafts come straight."""

    def wrapped(*args: Any, **kwargs: Any) -> None:
        raise OSError("You are trying to access a repo.") from error

    def straight(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(AutoConfig, "from_pretrained", wrapped)
    with pytest.raises(TargetError, match=expected):
        Target.from_pretrained("gated-org/model")
    monkeypatch.setattr("deepspec.targets.hub.snapshot_download", straight)
    with pytest.raises(CheckpointError, match=expected):
        find_checkpoint("gated-org/draft")


def test_hash_of_a_config_is_of_its_facts(target_dirs: dict[str, Path], tmp_path: Path) -> None:
    spec = TargetSpec.from_pretrained(str(target_dirs["qwen3"]))
    same = TargetSpec("elsewhere", {**spec.config, "transformers_version": "0", "dtype": "float16"})
    other = TargetSpec(spec.name, {**spec.config, "hidden_size": 1})
    assert spec.config_hash == same.config_hash != other.config_hash
    assert (spec.num_layers, spec.hidden_size, spec.vocab_size, spec.softcap) == (5, 48, 96, None)


@pytest.mark.parametrize(
    ("terminal", "gigabytes", "shown"), [(True, 2, True), (True, 0, False), (False, 2, False)]
)
def test_bars_are_for_those_who_wait_at_a_terminal(
    terminal: bool,
    gigabytes: int,
    shown: bool,
    target_dirs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "large"
    shutil.copytree(target_dirs["qwen3"], path)
    with (path / "more.bin").open("wb") as file:
        file.truncate(gigabytes * 10**9)  # takes no room
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    (path / "gone.bin").symlink_to(tmp_path / "nowhere")  # a bar is no reason not to load
    monkeypatch.setattr(hf_logging, "_tqdm_active", True)
    seen, usual, loaded = [], hf_logging.is_progress_bar_enabled(), AutoModelForCausalLM.from_pretrained

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(hf_logging.is_progress_bar_enabled())
        return loaded(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    load(path)
    assert seen == [shown]
    assert hf_logging.is_progress_bar_enabled() == usual


# ── the length of the context ─────────────────────────────────────────────────────────────────────────

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32768}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 40960}, 40960),
        ({}, None),
        # YaRN: what was trained times the factor, whatever max_position_embeddings says.
        ({"max_position_embeddings": 40960, "rope_scaling": YARN}, 131072),
        ({"max_position_embeddings": 32768, "rope_parameters": YARN}, 131072),
        ({"max_position_embeddings": 131072, "rope_parameters": YARN}, 131072),
        ({"rope_parameters": YARN}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "yarn", "factor": 2}}, 8192),
        ({"max_position_embeddings": 40960, "rope_scaling": YARN, "rope_parameters": DEFAULT}, 131072),
        ({"max_position_embeddings": 40960, "rope_scaling": None, "rope_parameters": YARN}, 131072),
        ({"max_position_embeddings": 40960, "rope_scaling": {**YARN, "factor": None}}, 40960),
        # The other kinds.
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 8192),
        ({"max_position_embeddings": 131072, "rope_parameters": LLAMA3}, 131072),
        (
            {
                "max_position_embeddings": 131072,
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "longrope", **FACTORS},
            },
            131072,
        ),
        ({"max_position_embeddings": 32768, "rope_scaling": {"type": "mrope", "mrope_section": [1]}}, 32768),
        # Nested by kind of layer; Gemma-3 writes the extended length.
        (
            {
                "max_position_embeddings": 8192,
                "rope_parameters": {"full_attention": {**YARN, "original_max_position_embeddings": 8192}}
                | {"sliding_attention": DEFAULT},
            },
            32768,
        ),
        (
            {
                "model_type": "gemma3_text",
                "max_position_embeddings": 131072,
                "rope_parameters": {"full_attention": LINEAR, "sliding_attention": DEFAULT},
            },
            131072,
        ),
    ],
)
def test_context_is_the_trained_length_times_the_factor_of_its_positions(
    config: dict[str, Any], expected: int | None
) -> None:
    assert context_length(config) == expected


@pytest.mark.parametrize(
    ("model_type", "whole", "expected"),
    [
        # As published: Gemma-3 leaves the length to its class, Qwen-VL's files have a text part or none.
        ("gemma3", {"text_config": {"rope_scaling": {"type": "linear", "factor": 8.0}}}, 131072),
        ("qwen2_5_vl", {"text_config": {"max_position_embeddings": 128000}}, 128000),
        (
            "qwen2_5_vl",
            {
                "text_config": {
                    "max_position_embeddings": 32768,
                    "rope_scaling": {**YARN, "mrope_section": [1, 1, 2]},
                }
            },
            131072,
        ),
        ("llama", {"max_position_embeddings": 64, "rope_scaling": {"type": "linear", "factor": 2.0}}, 128),
        ("qwen3", {"max_position_embeddings": 40960, "rope_scaling": YARN}, 131072),
        (
            "deepseek_v3",
            {
                "max_position_embeddings": 163840,
                "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
            },
            163840,
        ),
    ],
)
def test_context_of_configs_as_they_are_published(
    tmp_path: Path, model_type: str, whole: dict[str, Any], expected: int
) -> None:
    whole = {"model_type": model_type} | copy.deepcopy(whole)
    part = whole.get("text_config", whole)
    part |= {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    part |= {"head_dim": 16, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(whole), "utf-8")
    assert TargetSpec.from_pretrained(str(tmp_path)).context_length == expected
    assert "context_length" not in TargetSpec.from_pretrained(str(tmp_path)).config


def scaled(target_dirs: dict[str, Path], path: Path, rope: dict[str, Any], positions: int = 16) -> Target:
    """The Llama target with other rotary positions."""
    shutil.copytree(target_dirs["llama"], path)
    config = json.loads((path / "config.json").read_text("utf-8"))
    config |= {"max_position_embeddings": positions, "rope_parameters": {"rope_theta": 1e4, **rope}}
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    return load(path)


def test_yarn_target_reads_past_its_unscaled_positions(target_dirs: dict[str, Path], tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    target = scaled(target_dirs, tmp_path / "t", rope)
    assert target.max_length == 64
    assert (target.room(60, 10), target.room(60, 2), target.room(64, 2)) == (4, 2, 0)
    assert len(generate(target, None, [5] * 40, 12, ignore_eos=True).token_ids) == 12


def test_positions_that_turn_with_the_length_limit_the_context(
    target_dirs: dict[str, Path], tmp_path: Path
) -> None:
    """A server reads 32 tokens of this target; our cached keys would be wrong past 16."""
    target = scaled(target_dirs, tmp_path / "t", {"rope_type": "dynamic", "factor": 2.0})
    assert (target.spec.context_length, target.max_length) == (32, 16)


# ── transformers' own generate ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 5.0, "no_repeat_ngram_size": 2},
        {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
        {"stop_strings": ["."]},
        {"do_sample": True, "temperature": 9.0, "top_k": 3, "top_p": 0.2, "min_p": 0.3, "typical_p": 0.5},
        {"bad_words_ids": [[i] for i in range(30)], "suppress_tokens": list(range(30, 50))},
        {"min_length": 30, "min_new_tokens": 20, "max_length": 7, "forced_eos_token_id": 9},
        {"guidance_scale": 3.0, "exponential_decay_length_penalty": [1, 5.0]},
        {"prompt_lookup_num_tokens": 3, "sequence_bias": [[[4], 90.0]], "num_return_sequences": 1},
        {"begin_suppress_tokens": list(range(40)), "renormalize_logits": True, "max_time": 1e-9},
    ],
    ids=lambda asked: next(iter(asked)),
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_baseline_follows_the_same_law_whatever_the_generation_config_asks_for(
    target_dirs: dict[str, Path], tmp_path: Path, asked: dict[str, Any], temperature: float
) -> None:
    path = tmp_path / "target"
    shutil.copytree(target_dirs["llama"], path)
    prompt = [5, 6, 5, 6, 5]

    def answer(facts: dict[str, Any]) -> list[int]:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **facts}), "utf-8")
        target = load(path)
        before = target.model.generation_config
        torch.manual_seed(3)
        found = target.transformers_generate(prompt, 12, temperature, [63])
        assert target.model.generation_config is before
        if temperature == 0:
            assert found == generate(target, None, prompt, 12, stop_token_ids=[63]).token_ids
        return found

    assert answer(asked) == answer({})


def test_baseline_stops_where_the_context_ends(target_dirs: dict[str, Path], tmp_path: Path) -> None:
    target = scaled(target_dirs, tmp_path / "t", {"rope_type": "default"})
    found = target.transformers_generate([5] * 12, 9, 0.0, [])
    assert len(found) == 4
    assert found == generate(target, None, [5] * 12, 9, ignore_eos=True).token_ids
