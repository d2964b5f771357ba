"""The target room against `transformers` itself: features, heads, and cached steps over ragged slots."""

from __future__ import annotations

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
from deepspec.errors import CheckpointError, TargetError
from deepspec.targets import Target, TargetSpec
from sequences import CLOSE, Sequences, scripted


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
                sequences.step(operation)
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
    scripted(load(path))


def test_eager_attention_gets_its_mask_as_numbers(target_dirs: dict[str, Path]) -> None:
    """Eager attention adds the mask to its scores: a boolean one would only add one to what may be seen."""
    path = target_dirs["gemma4"]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    scripted(Target(TargetSpec.from_pretrained(str(path)), model.to(DEVICE)))


def test_rows_come_back_in_the_order_of_their_slots(target: Target) -> None:
    sequences = Sequences(target)
    sequences.step({slot: 2 + slot for slot in range(4)})
    for order in ((0, 2, 1, 3), (3, 2, 1, 0), (1, 3), (3, 1), (2, 3)):
        sequences.step({slot: 4 - slot for slot in order})


def test_growing_the_store_keeps_what_it_holds(target: Target) -> None:
    sequences = Sequences(target)
    sequences.step({1: 40})
    sequences.step({0: 5, 1: 3})
    sequences.step({0: 2, 1: 7})
    sequences.step({7: 130, 0: 4, 1: 1})
    sequences.step({0: 1, 1: 2, 7: 3})


def test_a_failed_request_for_features_leaves_the_hooks_whole(target: Target) -> None:
    ids = torch.tensor([[1, 2, 3]])
    want = target.read(ids, [0, 1]).features
    with pytest.raises(TargetError):
        target.read(ids, [99])
    assert torch.equal(target.read(ids, [0, 1]).features, want)


# ── loading ───────────────────────────────────────────────────────────────────────────────────────────


def test_target_without_a_tokenizer_has_no_stop_tokens(target: Target) -> None:
    """transformers invents an empty tokenizer for some families: its one token would end sentences."""
    assert target.tokenizer is None
    assert target.stop_token_ids == frozenset()


def test_stop_tokens_are_the_tokenizers_and_the_generation_configs(
    target_dirs: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "with tokenizer"
    shutil.copytree(target_dirs["llama"], path)
    words = {"<eos>": 0, "<unk>": 1, "<turn>": 2, **{f"w{i}": i for i in range(3, 64)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(
        path
    )
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}), "utf-8")
    target = load(path)
    assert target.tokenizer is not None
    assert target.stop_token_ids == {0, 2, 5}


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
    with pytest.raises(TargetError, match="is a file, and a target is the directory"):
        load(target_dirs["llama"] / "config.json")
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("models/mistyped", "./mistyped", "/no/where", "a/b/c"):
        with pytest.raises(TargetError, match="there is no such directory") as caught:
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
