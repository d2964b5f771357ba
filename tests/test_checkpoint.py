"""Drafts on disk: round trips, files that are broken in every way, and saves that are interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import ALGORITHMS, FAMILIES, save_tiny, tiny_draft
from deepspec.checkpoints import draft as checkpoint
from deepspec.checkpoints.draft import load_draft, new_draft, save_draft
from deepspec.checkpoints.inspect import inspect_draft
from deepspec.checkpoints.read import PROVENANCE, find_checkpoint, load_provenance, load_spec, read_parts
from deepspec.drafts.base import NeuralDraft
from deepspec.drafts.layers import inverse_frequencies
from deepspec.errors import CheckpointError, MismatchError
from deepspec.files import atomic_directory
from deepspec.maths.verify import Sampling
from deepspec.targets import Target

HEADS: dict[str, dict[str, Any]] = {
    "eagle3": {},
    "eagle3-portable": {"qk_norm": False},
    "dflash": {},
    "dspark": {},
    "dspark-gated": {"markov_head": "gated", "confidence_with_markov": False},
    "dspark-rnn": {"markov_head": "rnn", "confidence": False},
    "dspark-confidence-only": {"markov_rank": 0, "confidence_with_markov": False},
}


def named_draft(target: Target, name: str, seed: int = 0) -> NeuralDraft:
    return tiny_draft(target, name.split("-")[0], seed=seed, **HEADS[name])


@pytest.fixture
def qwen(targets: dict[str, Target]) -> Target:
    return targets["qwen3"]


@pytest.fixture(scope="module")
def saved_once(targets: dict[str, Target], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "draft"
    save_draft(tiny_draft(targets["qwen3"], "dspark"), path, targets["qwen3"], {"steps": 7})
    return path


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """A DSpark checkpoint to spoil."""
    return Path(shutil.copytree(saved_once, tmp_path / "draft"))


def assert_same(found: NeuralDraft, want: NeuralDraft) -> None:
    """Bit for bit, and the same proposals."""
    ours, theirs = found.state_dict(), want.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    want.settle()  # as `load_draft` does: products round by how weights lie in memory
    assert propose(found) == propose(want)


def propose(draft: NeuralDraft) -> tuple[list[int], list[float] | None]:
    """Proposals (and confidence) after three observed tokens."""
    width = draft.spec.shape.hidden * len(draft.spec.target_layer_ids)
    features = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(5)).to(draft.dtype)
    draft.open(0)
    with torch.no_grad():
        draft.observe([0], features, [[4, 5, 6]], [[5, 6, 7]])
        found = draft.propose([0], [7], Sampling(1.0), torch.full((1, draft.max_proposals), 0.5))
    return found.tokens[0].tolist(), None if found.confidence is None else found.confidence[0].tolist()


def respell(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((path / "config.json").read_text("utf-8"))
    change(config)
    (path / "config.json").write_text(json.dumps(config), "utf-8")


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


# ── round trips ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("family", "name"),
    [*(("qwen3", name) for name in HEADS), *((f, a) for f in ("llama", "gemma4") for a in ALGORITHMS)],
)
def test_saved_draft_loads_bit_for_bit(
    targets: dict[str, Target], family: str, name: str, tmp_path: Path
) -> None:
    target = targets[family]
    draft = named_draft(target, name)
    save_draft(draft, tmp_path / "run", target, {"steps": 3})
    loaded = load_draft(tmp_path / "run", target)
    assert_same(loaded, draft)
    assert loaded.spec == draft.spec
    assert loaded.name == "run"
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not loaded.training


def test_older_alignment_survives_the_round_trip(qwen: Target, tmp_path: Path) -> None:
    """The wrong alignment gives an accepted length near 1 and no error at all."""
    spec = replace(tiny_draft(qwen, "dflash").spec, sample_from_anchor=False)
    draft = new_draft(spec, qwen)
    save_draft(draft, tmp_path / "old", qwen, {})
    loaded = load_draft(tmp_path / "old", qwen)
    assert loaded.spec.sample_from_anchor is False
    assert loaded.max_proposals == spec.block - 1
    assert load_provenance(tmp_path / "old")["sample_from_anchor"] is False
    respell(tmp_path / "old", lambda c: c.pop("sample_from_anchor"))
    assert load_draft(tmp_path / "old", qwen).spec.sample_from_anchor is True


def test_targets_tensors_are_not_copied_into_the_file(saved: Path, qwen: Target) -> None:
    names = load_file(saved / "model.safetensors").keys()
    assert not {n for n in names if n.startswith(("embed_tokens", "lm_head", "frequencies"))}
    assert json.loads((saved / "config.json").read_text("utf-8"))["tie_word_embeddings"] is False
    assert load_provenance(saved) == {"steps": 7, "sample_from_anchor": True}


def test_run_directory_stands_for_its_best_checkpoint(saved: Path, qwen: Target, tmp_path: Path) -> None:
    best = tmp_path / "run" / "checkpoints" / "best"
    shutil.copytree(saved, best)
    assert find_checkpoint(tmp_path / "run") == best
    assert_same(load_draft(tmp_path / "run", qwen), load_draft(saved, qwen))


def test_sharded_checkpoint_equals_the_single_file(saved: Path, qwen: Target) -> None:
    want = load_draft(saved, qwen)
    shard(saved)
    assert_same(load_draft(saved, qwen), want)


def shard(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, path / file)
    index = {"metadata": {}, "weight_map": {k: file for file, keys in parts.items() for k in keys}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def test_compiled_prefix_is_stripped(saved: Path, qwen: Target) -> None:
    want = load_draft(saved, qwen)
    tensors = load_file(saved / "model.safetensors")
    save_file({f"_orig_mod.{k}": v for k, v in tensors.items()}, saved / "model.safetensors")
    assert_same(load_draft(saved, qwen), want)


# ── number formats ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bfloat16_checkpoint_loads_into_a_float32_target(
    targets: dict[str, Target], algorithm: str, tmp_path: Path
) -> None:
    target = targets["llama"]
    draft = tiny_draft(target, algorithm)
    save_draft(draft, tmp_path / "half", target, {}, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "half" / "config.json").read_text("utf-8"))["dtype"] == "bfloat16"
    loaded = load_draft(tmp_path / "half", target)
    for name, tensor in draft.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[name], tensor.bfloat16().float()), name


@pytest.mark.parametrize(
    ("family", "algorithm"), [("qwen3", "eagle3"), ("gemma4", "dflash"), ("qwen3", "dspark")]
)
def test_rotary_frequencies_stay_float32_in_a_bfloat16_draft(
    target_dirs: dict[str, Path], family: str, algorithm: str, tmp_path: Path
) -> None:
    """`.to(bfloat16)` casts buffers too; frequencies off by 0.3% turn far positions wrongly."""
    target = Target.from_pretrained(target_dirs[family], dtype="bfloat16", device="cpu")
    draft = tiny_draft(target, algorithm)
    want = inverse_frequencies(draft.spec.shape)
    assert not torch.equal(want, want.bfloat16().float())
    save_draft(draft, tmp_path / "draft", target, {})
    for narrow in (load_draft(tmp_path / "draft", target), draft.to(torch.bfloat16)):
        assert narrow.dtype == torch.bfloat16
        assert narrow.frequencies.dtype == torch.float32
        assert torch.equal(narrow.frequencies, want)
    assert torch.equal(draft.float().frequencies, want)
    assert torch.equal(draft.half().frequencies, want)


# ── copies of the embedding and the head ──────────────────────────────────────────────────────────────


def add_copies(path: Path, target: Target, *, embedding: float = 0.0, head: float = 0.0) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["embed_tokens.weight"] = target.embedding.weight + embedding
        tensors["lm_head.weight"] = target.head.weight + head

    rewrite(path, change)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_copies_become_the_targets_own(targets: dict[str, Target], family: str, tmp_path: Path) -> None:
    target, path = targets[family], tmp_path / "draft"
    draft = tiny_draft(target, "dspark")
    save_draft(draft, path, target, {})
    add_copies(path, target)
    loaded = load_draft(path, target)
    assert loaded.head.weight.data_ptr() == target.head.weight.data_ptr()
    assert loaded.embedding.weight.data_ptr() == target.embedding.weight.data_ptr()
    assert_same(loaded, draft)


def test_different_head_is_the_drafts_own_and_the_teacher_stays_the_targets(
    targets: dict[str, Target], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, path = targets["gemma4"], tmp_path / "draft"
    save_draft(tiny_draft(target, "dspark"), path, target, {})
    add_copies(path, target, head=0.25)
    loaded = load_draft(path, target)
    assert "the draft has its own head, which differs from the target's" in capsys.readouterr().err
    assert torch.equal(loaded.head.weight, target.head.weight + 0.25)
    assert loaded.head.softcap == target.head.softcap is not None
    assert loaded.teacher_head.weight.data_ptr() == target.head.weight.data_ptr()
    assert loaded.embedding.weight.data_ptr() == target.embedding.weight.data_ptr()


def test_different_embedding_keeps_the_familys_factor(targets: dict[str, Target], tmp_path: Path) -> None:
    target, path = targets["gemma4"], tmp_path / "draft"
    save_draft(tiny_draft(target, "dspark"), path, target, {})
    add_copies(path, target, embedding=0.25)
    loaded = load_draft(path, target)
    assert torch.equal(loaded.embedding.weight, target.embedding.weight + 0.25)
    assert loaded.embedding.scale == target.embedding.scale != 1
    assert loaded.head.weight.data_ptr() == target.head.weight.data_ptr()


def test_head_and_embedding_of_its_own_survive_a_save(targets: dict[str, Target], tmp_path: Path) -> None:
    """Saved without them, the draft would come back with the target's head, and guess badly."""
    target, path = targets["llama"], tmp_path / "draft"
    save_draft(tiny_draft(target, "dspark"), path, target, {})
    add_copies(path, target, embedding=0.5, head=0.25)
    loaded = load_draft(path, target)
    save_draft(loaded, tmp_path / "again", target, {})
    again = load_draft(tmp_path / "again", target)
    assert torch.equal(again.head.weight, target.head.weight + 0.25)
    assert torch.equal(again.embedding.weight, target.embedding.weight + 0.5)
    assert_same(again, loaded)


@pytest.mark.parametrize("lone", ["embed_tokens.weight", "lm_head.weight"])
def test_lone_copy_is_refused(saved: Path, qwen: Target, lone: str) -> None:
    rewrite(saved, lambda tensors: tensors.update({lone: qwen.head.weight.clone()}))
    with pytest.raises(CheckpointError, match=f"{lone} is stored without its partner"):
        load_draft(saved, qwen)


def test_copy_of_the_wrong_shape_is_refused(saved: Path, qwen: Target) -> None:
    add_copies(saved, qwen)
    rewrite(saved, lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:-1].contiguous()}))
    with pytest.raises(
        CheckpointError, match=r"lm_head.weight has the shape \[95, 48\], but config.json implies \[96, 48\]"
    ):
        load_draft(saved, qwen)


# ── broken files ──────────────────────────────────────────────────────────────────────────────────────


def test_missing_and_unknown_tensors_are_named(saved: Path, qwen: Target) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["layers.0.mlp.extra.weight"] = tensors.pop("fc.weight")

    rewrite(saved, change)
    with pytest.raises(CheckpointError) as caught:
        load_draft(saved, qwen)
    assert "missing: fc.weight" in str(caught.value)
    assert "not known: layers.0.mlp.extra.weight" in str(caught.value)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("only", ["missing", "extra"])
def test_one_tensor_too_few_or_too_many_is_refused(saved: Path, qwen: Target, only: str) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        if only == "missing":
            del tensors["norm.weight"]
        else:
            tensors["more.weight"] = torch.zeros(1)

    rewrite(saved, change)
    with pytest.raises(CheckpointError, match="missing: norm.weight" if only == "missing" else "more.weight"):
        load_draft(saved, qwen)


def test_heads_that_the_config_turns_off_are_not_ignored(saved: Path, qwen: Target) -> None:
    respell(saved, lambda c: c.update(markov_rank=0, enable_confidence_head=False))
    with pytest.raises(CheckpointError, match=r"not known: confidence_head\.proj\.bias"):
        load_draft(saved, qwen)


def test_misshapen_tensor_names_both_shapes(saved: Path, qwen: Target) -> None:
    rewrite(saved, lambda t: t.update({"norm.weight": torch.ones(47)}))
    with pytest.raises(
        CheckpointError, match=r"norm.weight has the shape \[47\], but config.json implies \[48\]"
    ):
        load_draft(saved, qwen)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_torn_file_is_refused(saved: Path, qwen: Target, share: float) -> None:
    weights = saved / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match="torn or not safetensors") as caught:
        load_draft(saved, qwen)
    assert str(weights) in str(caught.value)


def test_missing_weights_shard_and_index_are_refused(saved: Path, qwen: Target) -> None:
    shard(saved)
    (saved / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="a shard named in the index is missing") as caught:
        load_draft(saved, qwen)
    assert "model-00002-of-00002" in str(caught.value)
    for content in ("{", "{}", "[]"):
        (saved / "model.safetensors.index.json").write_text(content, "utf-8")
        with pytest.raises(CheckpointError, match="index of shards cannot be read"):
            load_draft(saved, qwen)
    (saved / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_draft(saved, qwen)


def test_torn_shard_is_named_and_so_is_one_of_an_older_save(saved: Path, qwen: Target) -> None:
    shard(saved)
    second = saved / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match="torn or not safetensors") as caught:
        load_draft(saved, qwen)
    assert str(second) in str(caught.value)
    second.write_bytes((saved / "model-00001-of-00002.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"(?s)missing: .*no shard is an older one") as caught:
        load_draft(saved, qwen)
    assert "next: " in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_unreadable_config_is_refused(saved: Path, qwen: Target, content: str) -> None:
    (saved / "config.json").write_text(content, "utf-8")
    with pytest.raises(CheckpointError) as caught:
        load_draft(saved, qwen)
    assert str(saved / "config.json") in str(caught.value)


def test_unreadable_provenance_is_refused(saved: Path) -> None:
    (saved / PROVENANCE).write_text("{", "utf-8")
    with pytest.raises(CheckpointError, match=r"deepspec\.json cannot be read"):
        load_provenance(saved)


def test_unknown_architecture_lists_those_that_are_known(saved: Path, qwen: Target) -> None:
    respell(saved, lambda c: c.update(architectures=["Qwen3ForCausalLM"]))
    with pytest.raises(CheckpointError, match="'Qwen3ForCausalLM' is not a draft's") as caught:
        load_draft(saved, qwen)
    for known in ("Qwen3DSparkModel", "Gemma4DSparkModel", "Qwen3Eagle3Model", "Gemma4Eagle3Model"):
        assert known in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"target_layer_ids": None}, "no 'target_layer_ids'"),
        ({"target_layer_ids": [2, 1]}, "must rise strictly"),
        ({"target_layer_ids": [0, 4]}, "at least -1 .* and at most 3"),
        ({"block_size": 0}, "proposes nothing"),
        ({"block_size": "seven"}, "block_size is 'seven', not a whole number"),
        ({"hidden_size": "48"}, "hidden_size is '48', not a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, not a whole number of at least 1"),
        ({"num_target_layers": "5"}, "num_target_layers is '5', not a whole number"),
        ({"target_layer_ids": 3}, "target_layer_ids is 3, not a list"),
        ({"target_layer_ids": "13"}, "target_layer_ids is '13', not a list"),
        ({"mask_token_id": 96}, "outside the vocabulary of 96"),
        ({"markov_head_type": "gru"}, "'gru' is not one of vanilla, gated, rnn"),
        ({"hidden_act": "mish"}, "'mish' is not one of"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn' is not supported"),
    ],
)
def test_config_that_no_draft_can_have_says_why(
    saved: Path, qwen: Target, change: dict[str, Any], message: str
) -> None:
    respell(saved, lambda c: c.update(change))
    with pytest.raises(CheckpointError, match=message):
        load_draft(saved, qwen)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_not_read_without_their_scales(
    saved: Path, qwen: Target, dtype: torch.dtype
) -> None:
    """Cast to float they would load, propose badly, and say nothing."""
    file = saved / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"fc.weight": tensors["fc.weight"].to(dtype)}, file)
    with pytest.raises(CheckpointError, match=r"fc\.weight is stored as "):
        load_draft(saved, qwen)
    with pytest.raises(CheckpointError, match=r"fc\.weight is stored as "):
        inspect_draft(saved)


def test_weights_that_are_not_finite_are_refused(saved: Path, qwen: Target) -> None:
    """Such a draft is lossless and useless: τ would be 1.00, without a word."""
    file = saved / "model.safetensors"
    tensors = load_file(file)
    tensors["fc.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"fc\.weight holds numbers that are not finite"):
        load_draft(saved, qwen)


def test_missing_draft_names_the_forms_a_name_can_have(qwen: Target, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no draft .*absent") as caught:
        load_draft(tmp_path / "absent", qwen)
    assert "pocket-dspark" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"no config\.json here"):
        load_draft(tmp_path, qwen)


def test_draft_on_the_hub_loads_by_its_id(
    saved: Path, qwen: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistyped path whose folder is here is not looked for there."""
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(saved)

    monkeypatch.setattr("deepspec.targets.hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    draft = load_draft("some-org/some-draft", qwen)
    assert (draft.name, draft.spec) == ("some-draft", load_draft(saved, qwen).spec)
    assert asked == [("some-org/some-draft", ["*.json", "*.safetensors"])]
    for name in ("runs/mistyped", "pocket-dspak", "./some-org/some-draft"):
        with pytest.raises(CheckpointError, match="no draft"):
            find_checkpoint(name)
    assert len(asked) == 1


# ── drafts of another target ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("hidden_size", 64, "its hidden width is 64, and the target's is 48"),
        ("vocab_size", 200, "its vocabulary is 200, and the target's is 96"),
        ("num_target_layers", 9, "it is for a target of 9 layers, and this one has 5"),
    ],
)
def test_draft_of_another_target_is_refused_with_both_numbers(
    saved: Path, qwen: Target, key: str, value: int, message: str
) -> None:
    respell(saved, lambda c: c.update({key: value}))
    with pytest.raises(MismatchError, match=message) as caught:
        load_draft(saved, qwen)
    assert qwen.spec.name in str(caught.value)


def test_whole_draft_of_another_family_is_refused(targets: dict[str, Target], saved: Path) -> None:
    with pytest.raises(MismatchError, match="its hidden width is 48, and the target's is 32"):
        load_draft(saved, targets["gemma4"])
    with pytest.raises(MismatchError, match="hidden width"):
        new_draft(load_spec(saved), targets["llama"])


# ── interrupted saves ─────────────────────────────────────────────────────────────────────────────────


def test_exception_while_filling_leaves_the_old_directory_whole(tmp_path: Path) -> None:
    path = tmp_path / "best"
    with atomic_directory(path) as part:
        (part / "a").write_text("old", "utf-8")
    with pytest.raises(RuntimeError), atomic_directory(path) as part:
        (part / "a").write_text("new", "utf-8")
        raise RuntimeError
    assert (path / "a").read_text("utf-8") == "old"
    with atomic_directory(path) as part:
        assert not list(part.iterdir()), "leftovers of the failed save"
        (part / "b").write_text("newer", "utf-8")
    assert [p.name for p in path.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


def test_exception_while_saving_leaves_the_old_checkpoint_whole(
    saved: Path, qwen: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = load_draft(saved, qwen)

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", full_disk)
        with pytest.raises(OSError, match="No space left"):
            save_draft(tiny_draft(qwen, "dspark", seed=9), saved, qwen, {})
    assert_same(load_draft(saved, qwen), want)


def steps_of_a_save(patch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count (in the one-element list) every call of a save that changes what is on the disk, and die at the
    one that brings it to 0. An fsync changes nothing that a killed process leaves behind."""
    count = [0]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] -= 1
            if count[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    patch.setattr(checkpoint, "save_file", counted(checkpoint.save_file))
    patch.setattr(os, "replace", counted(os.replace))
    patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
    for name in ("rename", "mkdir"):
        patch.setattr(Path, name, counted(getattr(Path, name)))
    yield count


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_kill_at_any_moment_of_a_save_leaves_a_whole_checkpoint(
    saved: Path, qwen: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call that touches the disk is a moment to die at; what is found after it is the old checkpoint
    or the new one, and the next save works."""
    old, new = load_draft(saved, qwen), tiny_draft(qwen, "dspark", seed=9)
    spotless = saved.with_name("spotless")
    shutil.copytree(saved, spotless)
    found_new = []
    for moment in range(1, 100):
        for leftover in [p for p in saved.parent.iterdir() if p != spotless]:
            shutil.rmtree(leftover)
        shutil.copytree(spotless, saved)
        if not killed_at(moment, monkeypatch, lambda: save_draft(new, saved, qwen, {})):
            break
        found, _ = read_parts(find_checkpoint(saved), old.spec)
        found_new.append(torch.equal(found["fc.weight"], new.fc.weight))
        want = (new if found_new[-1] else old).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in want.items())
        save_draft(new, saved, qwen, {})
        assert {p.name for p in saved.parent.iterdir()} == {"draft", "spotless"}
    assert_same(load_draft(saved, qwen), new)
    assert len(found_new) >= 10, "moments that were tried"
    assert found_new == sorted(found_new), "once new, never old again"
    assert not found_new[0] and found_new[-1]


def killed_at(moment: int, monkeypatch: pytest.MonkeyPatch, save: Callable[[], None]) -> bool:
    """Run `save` in a fork that dies at its `moment`-th disk call; False where it had no so many."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with monkeypatch.context() as patch:
                next(steps_of_a_save(patch))[0] = moment
                save()
            status = 0
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    assert os.WIFSIGNALED(ended) or os.WEXITSTATUS(ended) == 0, "the save failed by itself"
    return os.WIFSIGNALED(ended)


def test_second_checkpoint_of_the_same_name_replaces_the_first(saved: Path, qwen: Target) -> None:
    draft = tiny_draft(qwen, "dflash", seed=3)
    save_draft(draft, saved, qwen, {"steps": 8})
    assert_same(load_draft(saved, qwen), draft)
    assert load_provenance(saved)["steps"] == 8


def test_new_draft_depends_on_its_seed_and_on_nothing_else(qwen: Target) -> None:
    spec = tiny_draft(qwen, "dspark").spec
    torch.manual_seed(1)
    first = new_draft(spec, qwen, seed=4)
    state = torch.random.get_rng_state()
    torch.manual_seed(2)
    again, other = new_draft(spec, qwen, seed=4), new_draft(spec, qwen, seed=5)
    assert torch.equal(first.fc.weight, again.fc.weight)
    assert not torch.equal(first.fc.weight, other.fc.weight)
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"


def test_draft_of_a_saved_target_in_another_place_loads(targets: dict[str, Target], tmp_path: Path) -> None:
    """A draft belongs to a target by its dimensions, not by the directory that it was trained from."""
    from conftest import llama

    path = save_tiny(llama, tmp_path / "elsewhere", seed=1)
    draft = tiny_draft(targets["llama"], "eagle3")
    save_draft(draft, tmp_path / "draft", targets["llama"], {})
    assert_same(load_draft(tmp_path / "draft", targets["llama"]), draft)
    load_draft(tmp_path / "draft", Target.from_pretrained(path, dtype="float32", device="cpu"))
