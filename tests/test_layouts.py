"""Drafts that others wrote: the older DFlash layout, the speculators layout, a reduced vocabulary.

The checkpoints here are tiny random ones, written as those layouts are described; what they propose is
compared with naive loops over the same weights (`reference/drafts.py`).
"""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from conftest import tiny_draft
from deepspec.checkpoints.draft import load_draft, save_draft
from deepspec.checkpoints.export import export_draft
from deepspec.checkpoints.inspect import inspect_draft
from deepspec.checkpoints.layouts import as_released, layout_of
from deepspec.checkpoints.read import check_formats, load_spec
from deepspec.checkpoints.servers import SERVERS
from deepspec.cli import app
from deepspec.decode.engine import generate
from deepspec.drafts.base import NeuralDraft
from deepspec.drafts.spec import SpecError, read_spec
from deepspec.errors import CheckpointError, MismatchError, UserError
from deepspec.maths.verify import Sampling
from deepspec.targets import Target
from reference.drafts import naive_block_rows, naive_markov, naive_unroll
from reference.served import expected_tensors

V, K, H, MLP, N, G, D, R, DEPTH = 96, 40, 48, 64, 4, 2, 16, 8, 5
"""Vocabulary, kept ids, width, MLP, heads, key heads, head dim, Markov rank; depth of the `qwen3` target."""
DECODER = {
    "model_type": "qwen3",
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": MLP,
    "num_hidden_layers": 2,
    "num_attention_heads": N,
    "num_key_value_heads": G,
    "head_dim": D,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "layer_types": ["full_attention"] * 2,
}
OLDER = {
    **DECODER,
    "architectures": ["DFlashDraftModel"],
    "block_size": 5,
    "dflash_config": {"target_layer_ids": [0, 1, 3], "mask_token_id": 7},
    "num_target_layers": DEPTH,
}


def speculators(kind: str, **changes: Any) -> dict[str, Any]:
    """A config as the speculators package writes it; `layers` in its numbering: what enters a layer."""
    config: dict[str, Any] = {
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "architectures": ["Eagle3DraftModel"],
        "dtype": "float32",
        "tie_word_embeddings": False,
        "draft_vocab_size": V,
        "target_hidden_size": None,
        "transformer_layer_config": dict(DECODER),
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 4}],
            "verifier": {"name_or_path": None, "architectures": []},
        },
    }
    if kind == "eagle3":
        decoder = {**DECODER, "model_type": "llama", "num_hidden_layers": 1, "mlp_bias": False}
        config["transformer_layer_config"] = {k: v for k, v in decoder.items() if k != "layer_types"}
        config["eagle_aux_hidden_state_layer_ids"] = [1, 2, 4]
        config |= {"norm_before_residual": False, "norm_before_fc": False, "fc_norm": False}
        config["norm_output"] = False
    else:
        config |= {"aux_hidden_state_layer_ids": [1, 2, 4], "block_size": 5, "mask_token_id": 7}
    if kind == "dspark":
        config |= {"markov_rank": R, "markov_head_type": "vanilla", "enable_confidence_head": True}
        config |= {"confidence_head_with_markov": True, "sample_from_anchor": True}
    return config | changes


def layer_names(prefix: str, fan_in: int, *, qk_norm: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (H,),
        "post_attention_layernorm.weight": (H,),
        "self_attn.q_proj.weight": (N * D, fan_in),
        "self_attn.k_proj.weight": (G * D, fan_in),
        "self_attn.v_proj.weight": (G * D, fan_in),
        "self_attn.o_proj.weight": (H, N * D),
        "mlp.gate_proj.weight": (MLP, H),
        "mlp.up_proj.weight": (MLP, H),
        "mlp.down_proj.weight": (H, MLP),
    }
    if qk_norm:
        shapes |= {"self_attn.q_norm.weight": (D,), "self_attn.k_norm.weight": (D,)}
    return {prefix + name: shape for name, shape in shapes.items()}


def block_names(*, markov_rows: int | None = None) -> dict[str, tuple[int, ...]]:
    names: dict[str, tuple[int, ...]] = {"fc.weight": (H, 3 * H), "norm.weight": (H,)}
    names["hidden_norm.weight"] = (H,)
    for i in range(2):
        names |= layer_names(f"layers.{i}.", H, qk_norm=True)
    if markov_rows is not None:
        names |= {"markov_head.markov_w1.weight": (V, R), "markov_head.markov_w2.weight": (markov_rows, R)}
        names |= {"confidence_head.proj.weight": (1, H + R), "confidence_head.proj.bias": (1,)}
    return names


def eagle_names(*, norm_before_fc: bool = False) -> dict[str, tuple[int, ...]]:
    names: dict[str, tuple[int, ...]] = {"fc.weight": (H, 3 * H), "norm.weight": (H,)}
    names |= layer_names("layers.0.", 2 * H, qk_norm=False) | {"layers.0.hidden_norm.weight": (H,)}
    return names | ({"input_norm.weight": (3 * H,)} if norm_before_fc else {})


def random_tensors(names: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Matrices around zero; vectors, which are norms, around one."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=random) * 0.3 + (1.0 if len(shape) == 1 else 0.0)
        for name, shape in names.items()
    }


def reduced(tensors: dict[str, Tensor], seed: int = 3) -> Tensor:
    """Give tensors a head over K of V ids and the maps; the kept ids."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randperm(V, generator=random)[:K].sort().values
    tensors["lm_head.weight"] = torch.randn(K, H, generator=random)
    tensors["d2t"] = ids - torch.arange(K)
    tensors["t2d"] = torch.zeros(V, dtype=torch.bool).index_fill_(0, ids, True)
    return ids


def write(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config), "utf-8")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def propose(draft: NeuralDraft, features: Tensor, ids: list[int]) -> tuple[list[int], Tensor]:
    """Greedy tokens and full-width q at temperature 1 after the anchor `ids[-1]`."""
    found = []
    for sampling in (Sampling(), Sampling(1.0)):
        draft.open(0)
        draft.observe([0], features[None], [ids[:-1]], [ids[1:]])
        uniforms = torch.full((1, draft.max_proposals), 0.5)
        found.append(draft.propose([0], [ids[-1]], sampling, uniforms))
    return found[0].tokens[0].tolist(), found[1].q[0]


@pytest.fixture
def qwen(targets: dict[str, Target]) -> Target:
    return targets["qwen3"]


@pytest.fixture
def seen(qwen: Target) -> tuple[Tensor, list[int]]:
    """(features [5, 3·H] of the target's own layers 0, 1, 3; the tokens, and the anchor after them)."""
    ids = [4, 9, 2, 33, 51, 17]
    features = qwen.read(torch.tensor([ids[:-1]]), [0, 1, 3]).features
    assert features is not None
    return features[0], ids


# ── the older DFlash layout ───────────────────────────────────────────────────────────────────────────


def test_older_dflash_slot_j_proposes_the_jth_token_after_the_anchor(
    qwen: Target, seen: tuple[Tensor, list[int]], tmp_path: Path
) -> None:
    """Read as the newer layout it would propose what slot 0 says, which was never trained."""
    draft = load_draft(write(tmp_path / "d", OLDER, random_tensors(block_names())), qwen)
    features, ids = seen
    assert (draft.spec.algorithm, draft.spec.sample_from_anchor, draft.max_proposals) == ("dflash", False, 4)
    assert (draft.spec.target_layer_ids, draft.spec.mask_token_id) == ((0, 1, 3), 7)
    tokens, q = propose(draft, features, ids)
    rows = naive_block_rows(draft, features, ids[-1])
    logits = rows @ qwen.head.weight.T
    assert tokens == logits[1:].argmax(-1).tolist()
    torch.testing.assert_close(q, logits[1:].softmax(-1), atol=1e-5, rtol=1e-4)
    assert tokens != logits[:-1].argmax(-1).tolist()


def test_older_dflash_with_its_prefix_its_copies_and_no_depth(qwen: Target, tmp_path: Path) -> None:
    tensors = random_tensors(block_names())
    plain = load_draft(write(tmp_path / "a", OLDER, tensors), qwen)
    config = {k: v for k, v in OLDER.items() if k != "num_target_layers"}
    copies = {
        "embed_tokens.weight": qwen.embedding.weight.clone(),
        "lm_head.weight": qwen.head.weight.clone(),
    }
    both = {f"model.{k}": v for k, v in (tensors | copies).items()}
    other = load_draft(write(tmp_path / "b", config, both), qwen)
    assert other.spec == plain.spec
    assert all(torch.equal(t, plain.state_dict()[k]) for k, t in other.state_dict().items())
    assert other.head.weight is qwen.head.weight


def test_depth_that_a_config_leaves_out_is_checked_by_the_layers_it_reads(
    qwen: Target, tmp_path: Path
) -> None:
    config = {**OLDER, "num_target_layers": None}
    config["dflash_config"] = {"target_layer_ids": [0, 1, 4], "mask_token_id": 7}
    with pytest.raises(MismatchError, match="it reads layer 4, and the target has 5 layers"):
        load_draft(write(tmp_path / "d", config, random_tensors(block_names())), qwen)


@pytest.mark.parametrize(
    ("nested", "top", "message"),
    [
        ({"causal": True}, {}, "a DFlash draft with causal is not supported"),
        ({"use_swa": True, "swa_window_size": 8}, {}, "swa_window_size, use_swa"),
        ({"projector_type": "domino"}, {}, "projector_type"),
        ({}, {"is_causal": True}, "is_causal"),
        ({}, {"layer_types": ["sliding_attention"] * 2}, "layer_types has sliding_attention"),
        ({"mask_token_id": None}, {}, "no 'mask_token_id'"),
        ({"target_layer_ids": None}, {}, "no 'target_layer_ids'"),
    ],
)
def test_older_dflash_that_would_be_computed_otherwise_is_refused(
    nested: dict[str, Any], top: dict[str, Any], message: str
) -> None:
    config = {**OLDER, **top, "dflash_config": {**OLDER["dflash_config"], **nested}}  # type: ignore[dict-item]
    with pytest.raises(SpecError, match=message):
        read_spec(as_released(config))


# ── the speculators layout ────────────────────────────────────────────────────────────────────────────

WAYS = ("norm_before_fc", "norm_before_residual", "norm_output")


@pytest.mark.parametrize("way", WAYS)
def test_speculators_eagle3_computes_each_of_its_norms(
    qwen: Target, seen: tuple[Tensor, list[int]], tmp_path: Path, way: str
) -> None:
    """One on and the others off, each in turn: every norm is computed with and without."""
    config = speculators("eagle3", **{way: True})
    names = eagle_names(norm_before_fc=way == "norm_before_fc")
    draft = load_draft(write(tmp_path / "d", config, random_tensors(names)), qwen)
    features, ids = seen
    assert (draft.spec.algorithm, draft.max_proposals, draft.spec.shape.qk_norm) == ("eagle3", 4, False)
    assert draft.spec.target_layer_ids == (0, 1, 3)  # theirs name what enters a layer
    tokens, _ = propose(draft, features, ids)
    # The unroll of the last row reads the anchor, then its own proposals: its steps are the decoding's. The
    # rows after it are not seen from it.
    after = torch.zeros(1 + len(tokens), features.shape[1])
    states = naive_unroll(draft, torch.cat([features, after]), [*ids, *tokens])
    for step, state in enumerate(states[: draft.max_proposals]):
        last = state[len(features) - 1]
        rms = last / torch.sqrt((last * last).mean() + 1e-6) * draft.norm.weight
        assert int((qwen.head.weight @ rms).argmax()) == tokens[step]


@pytest.mark.parametrize("kind", ["dflash", "dspark"])
def test_speculators_block_draft_has_its_own_default_alignment(
    qwen: Target, tmp_path: Path, kind: str
) -> None:
    config = speculators(kind)
    config.pop("sample_from_anchor", None)
    names = block_names(markov_rows=V if kind == "dspark" else None)
    draft = load_draft(write(tmp_path / "d", config, random_tensors(names)), qwen)
    assert draft.spec.algorithm == kind
    assert draft.spec.sample_from_anchor is (kind == "dspark")
    assert draft.max_proposals == (5 if kind == "dspark" else 4)


def test_layers_left_to_the_targets_depth_are_theirs_not_our_rule() -> None:
    config = speculators("eagle3", eagle_aux_hidden_state_layer_ids=None)
    assert read_spec(as_released(config, 36)).target_layer_ids == (1, 17, 32)
    with pytest.raises(SpecError, match="depends on the target's depth"):
        as_released(config)


@pytest.mark.parametrize(
    ("kind", "change", "inner", "message"),
    [
        ("peagle", {}, {}, "'peagle' is not supported"),
        ("eagle3", {"fc_norm": True}, {}, "fc_norm is True"),
        ("eagle3", {}, {"mlp_bias": True}, "mlp_bias is True"),
        ("eagle3", {"target_hidden_size": 64}, {}, "target_hidden_size is 64"),
        ("eagle3", {}, {"model_type": "gpt2"}, "model_type 'gpt2'"),
        ("eagle3", {}, {"num_hidden_layers": 2}, "1 layer\\(s\\), not 2"),
        ("eagle3", {"speculators_config": {"proposal_methods": []}}, {}, "speculative_tokens is missing"),
        ("eagle3", {"transformer_layer_config": None}, {}, "no 'transformer_layer_config'"),
        ("dflash", {}, {"model_type": "llama"}, "model_type 'llama', which is not supported for dflash"),
        ("dflash", {}, {"layer_types": ["sliding_attention"] * 2}, "sliding_attention"),
        ("dspark", {"aux_hidden_state_layer_ids": None}, {}, "no 'target_layer_ids'"),
        ("dspark", {"draft_vocab_size": V + 1}, {}, "draft_vocab_size 97"),
    ],
)
def test_speculators_draft_that_would_be_computed_otherwise_is_refused(
    kind: str, change: dict[str, Any], inner: dict[str, Any], message: str
) -> None:
    config = speculators(kind)
    config["transformer_layer_config"] |= inner
    with pytest.raises(SpecError, match=message):
        read_spec(as_released(config | change, DEPTH))


# ── other layouts, exported ───────────────────────────────────────────────────────────────────────────

LEFT_OVER = {"transformer_layer_config", "speculators_config", "speculators_model_type", "dflash_config"}
LEFT_OVER |= {"aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids", "auto_map", "rope_scaling"}
KINDS = ("eagle3", "dflash", "dspark", "older dflash")


def foreign(kind: str, path: Path, positions: int | None = 40960, **changes: Any) -> Path:
    """A draft of another layout, whose decoder config names so many positions."""
    ids = {"eagle3": "eagle_aux_hidden_state_layer_ids"}.get(kind, "aux_hidden_state_layer_ids")
    config = dict(OLDER) if kind == "older dflash" else speculators(kind, **{ids: [2, 3, 4]})
    inner = config if kind == "older dflash" else config["transformer_layer_config"]
    config |= (
        {"dflash_config": {"target_layer_ids": [1, 2, 3], "mask_token_id": 7}} if inner is config else {}
    )
    inner |= {} if positions is None else {"max_position_embeddings": positions}
    names = eagle_names() if kind == "eagle3" else block_names(markov_rows=V if kind == "dspark" else None)
    return write(path, config | changes, random_tensors(names))


def written(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text("utf-8"))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_draft_of_another_layout_is_exported_in_the_released_one(
    qwen: Target, seen: tuple[Tensor, list[int]], tmp_path: Path, kind: str
) -> None:
    path = foreign(kind, tmp_path / "d", auto_map={"AutoModel": "theirs.Draft"})
    export_draft(path, "deepspec", tmp_path / "out", target=qwen)
    config = written(tmp_path / "out")
    assert not LEFT_OVER & config.keys()
    assert (layout_of(config), config["model_type"]) == ("released", "qwen3")
    assert config["architectures"] == ["Qwen3Eagle3Model" if kind == "eagle3" else "Qwen3DSparkModel"]
    assert (config["num_target_layers"], config["target_layer_ids"]) == (DEPTH, [1, 2, 3])
    assert config["max_position_embeddings"] == 40960
    assert config["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"}
    heads = {"markov_rank": 8 if kind == "dspark" else 0, "enable_confidence_head": kind == "dspark"}
    expected = {"block_size": 5, "mask_token_id": 7, **heads} if kind != "eagle3" else {"ttt_length": 4}
    assert {key: config[key] for key in expected} == expected
    only = {"markov_head_type", "confidence_head_with_markov"}
    assert only & config.keys() == (only if kind == "dspark" else set())
    ours, theirs = load_draft(tmp_path / "out", qwen), load_draft(path, qwen)
    assert ours.spec == theirs.spec
    assert propose(ours, *seen)[0] == propose(theirs, *seen)[0]
    # Exported once more, nothing changes.
    export_draft(tmp_path / "out", "deepspec", tmp_path / "again")
    assert written(tmp_path / "again") == config


@pytest.mark.parametrize("kind", KINDS)
def test_server_gets_the_positions_of_the_draft_or_else_of_its_target(
    qwen: Target, tmp_path: Path, kind: str
) -> None:
    export_draft(foreign(kind, tmp_path / "own"), "vllm", tmp_path / "a")
    assert written(tmp_path / "a")["max_position_embeddings"] == 40960
    export_draft(tmp_path / "own", "vllm", tmp_path / "b", target=qwen)
    assert written(tmp_path / "b")["max_position_embeddings"] == 40960
    assert written(tmp_path / "b")["num_target_layers"] == DEPTH
    path = foreign(kind, tmp_path / "none", None)
    assert not any("positions" in n for n in export_draft(path, "vllm", tmp_path / "c", target=qwen).notes)
    assert written(tmp_path / "c")["max_position_embeddings"] == 256
    found = export_draft(path, "vllm", tmp_path / "d")
    assert written(tmp_path / "d")["max_position_embeddings"] == 4096
    assert any("does not say how many positions it has, so 4096 was written" in n for n in found.notes)


@pytest.mark.parametrize(
    "facts",
    [
        {"draft_vocab_size": "16"},
        {"draft_vocab_size": 16.0},
        {"num_key_value_heads": -2},
        {"head_dim": 8.5},
        {"layer_types": 5},
        {"rope_scaling": [1]},
        {"rms_norm_eps": "small"},
        {"final_logit_softcapping": "x"},
        {"target_layer_ids": {}},
    ],
    ids=str,
)
def test_value_of_another_kind_is_refused_as_the_configs(tmp_path: Path, qwen: Target, facts) -> None:
    save_draft(tiny_draft(qwen, "eagle3"), tmp_path / "d", qwen, {})
    file = tmp_path / "d" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | facts))
    for read in (lambda path: load_draft(path, qwen), inspect_draft):
        with pytest.raises(CheckpointError) as caught:
            read(tmp_path / "d")
        assert caught.value.where == str(file)


def test_layers_that_depend_on_the_targets_depth_are_exported_with_the_target(
    qwen: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = foreign("eagle3", tmp_path / "d", eagle_aux_hidden_state_layer_ids=None)
    with pytest.raises(CheckpointError, match="depends on the target's depth: give the target"):
        export_draft(path, "vllm", tmp_path / "out")
    deeper = replace(qwen.spec, config={**qwen.spec.config, "num_hidden_layers": 9})
    monkeypatch.setattr(qwen, "spec", deeper)
    export_draft(path, "vllm", tmp_path / "out", target=qwen)
    config = written(tmp_path / "out")
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 6]
    assert config["num_target_layers"] == 9
    for words in (["generate", "hello", "--draft", str(path)], ["verify", str(path)]):
        assert "give the target" not in CliRunner().invoke(app, words).stderr  # pocket was given


@pytest.mark.parametrize("way", WAYS)
def test_norms_of_eagle3_reach_the_servers_that_have_them(tmp_path: Path, way: str) -> None:
    """Written as if it had none, such a draft loaded and was hardly ever accepted."""
    config = speculators("eagle3", eagle_aux_hidden_state_layer_ids=[2, 3, 4], **{way: True})
    path = write(tmp_path / "d", config, random_tensors(eagle_names(norm_before_fc=way == "norm_before_fc")))
    without = {"norm_before_residual": "sglang", "norm_output": "llamacpp"}.get(way)
    for to in SERVERS:
        if to == without:
            with pytest.raises(UserError, match=way):
                export_draft(path, to, tmp_path / to)
            continue
        export_draft(path, to, tmp_path / to)
        config = written(tmp_path / to)
        assert {name: config[name] for name in WAYS} == {name: name == way for name in WAYS}
        tensors = load_file(tmp_path / to / "model.safetensors")
        assert {k: tuple(t.shape) for k, t in tensors.items()} == expected_tensors(config)


def test_draft_of_a_target_with_scaled_positions_is_written_with_their_whole_length(
    qwen: Target, target_dirs: dict[str, Path], tmp_path: Path
) -> None:
    """YaRN: 64 positions, stretched four times. The draft's own positions are plain."""
    folder = shutil.copytree(target_dirs["qwen3"], tmp_path / "yarn")
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    config = written(folder) | {"max_position_embeddings": 80, "rope_parameters": rope}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    target = Target.from_pretrained(folder, dtype="float32", device="cpu")
    draft = tiny_draft(target, "dspark", target_layer_ids=[1, 2, 3])
    save_draft(draft, tmp_path / "draft", target, {})
    assert written(tmp_path / "draft")["max_position_embeddings"] == 256
    for options in ({}, {"target": target}):
        export_draft(tmp_path / "draft", "vllm", tmp_path / "out", **options)
        assert written(tmp_path / "out")["max_position_embeddings"] == 256
    # Drafts saved before were given the unscaled length.
    older = written(tmp_path / "draft") | {"max_position_embeddings": 80}
    (tmp_path / "draft" / "config.json").write_text(json.dumps(older), "utf-8")
    export_draft(tmp_path / "draft", "vllm", tmp_path / "out", target=target)
    assert written(tmp_path / "out")["max_position_embeddings"] == 256


# ── a reduced vocabulary ──────────────────────────────────────────────────────────────────────────────


def reduced_draft(kind: str, path: Path) -> tuple[Path, Tensor]:
    config = speculators(kind, draft_vocab_size=K)
    names = eagle_names() if kind == "eagle3" else block_names(markov_rows=K if kind == "dspark" else None)
    tensors = random_tensors(names)
    ids = reduced(tensors)
    return write(path, config, tensors), ids


@pytest.mark.parametrize("kind", ["eagle3", "dflash", "dspark"])
def test_reduced_vocabulary_proposes_target_ids_from_a_full_width_distribution(
    qwen: Target, seen: tuple[Tensor, list[int]], tmp_path: Path, kind: str
) -> None:
    """Row i of a reduced head is not token i: read so, every proposal would be another word."""
    path, kept = reduced_draft(kind, tmp_path / "d")
    draft = load_draft(path, qwen)
    features, ids = seen
    tokens, q = propose(draft, features, ids)
    assert q.shape == (draft.max_proposals, V)
    torch.testing.assert_close(q.sum(-1), torch.ones(len(q)))
    outside = torch.ones(V, dtype=torch.bool).index_fill_(0, kept, False)
    assert q[:, outside].eq(0).all()
    assert set(tokens) <= set(kept.tolist())
    if kind == "eagle3":
        return
    rows = naive_block_rows(draft, features, ids[-1])[5 - draft.max_proposals :]
    logits = rows @ draft.head.weight.T
    if kind == "dspark":
        z = naive_markov(draft.markov_head, "vanilla", [ids[-1], *tokens[:-1]], rows)
        logits = logits + z @ draft.markov_head.markov_w2.weight.T
    assert tokens == kept[logits.argmax(-1)].tolist()


@pytest.mark.parametrize("kind", ["eagle3", "dflash", "dspark"])
def test_reduced_vocabulary_leaves_the_output_alone(qwen: Target, tmp_path: Path, kind: str) -> None:
    draft = load_draft(reduced_draft(kind, tmp_path / "d")[0], qwen)
    want = generate(qwen, None, [4, 9, 2], max_new_tokens=12, ignore_eos=True).token_ids
    assert generate(qwen, draft, [4, 9, 2], max_new_tokens=12, ignore_eos=True).token_ids == want


@pytest.mark.parametrize("kind", ["eagle3", "dflash", "dspark"])
def test_reduced_and_foreign_drafts_survive_a_save_in_our_layout(
    qwen: Target, seen: tuple[Tensor, list[int]], tmp_path: Path, kind: str
) -> None:
    draft = load_draft(reduced_draft(kind, tmp_path / "d")[0], qwen)
    save_draft(draft, tmp_path / "ours", qwen, {})
    again = load_draft(tmp_path / "ours", qwen)
    assert again.spec == draft.spec
    assert torch.equal(again.head.kept, draft.head.kept)
    assert all(torch.equal(t, draft.state_dict()[name]) for name, t in again.state_dict().items())
    tokens, q = propose(again, *seen)
    want, want_q = propose(draft, *seen)
    assert tokens == want
    torch.testing.assert_close(q, want_q)  # not bit for bit: kernels depend on where weights lie


@pytest.mark.parametrize("spoil", ["ids instead of offsets", "twice", "other members", "no map", "no head"])
def test_broken_map_of_a_reduced_vocabulary_is_refused(qwen: Target, tmp_path: Path, spoil: str) -> None:
    path, kept = reduced_draft("dflash", tmp_path / "d")
    tensors = load_file(path / "model.safetensors")
    if spoil == "ids instead of offsets":
        tensors["d2t"] = kept
    elif spoil == "twice":
        tensors["d2t"][1] = tensors["d2t"][0] - 1
        del tensors["t2d"]
    elif spoil == "other members":
        tensors["t2d"] = tensors["t2d"].roll(1)
    else:
        del tensors["d2t" if spoil == "no map" else "lm_head.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        load_draft(path, qwen)
    names = {"no map": "missing: d2t", "no head": "missing: lm_head.weight"}
    assert names.get(spoil, "does not map the draft's vocabulary to distinct ids") in str(caught.value)


def respelt(path: Path, **changes: Tensor) -> Path:
    tensors = load_file(path / "model.safetensors") | changes
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("name", ["d2t", "t2d"])
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
def test_maps_cast_with_the_weights_are_refused(qwen: Target, tmp_path: Path, name: str, kind: str) -> None:
    """Offsets above 256 are rounded in bfloat16: every proposal was another word, without an error."""
    path, _ = reduced_draft("dspark", tmp_path / "d")
    stored = load_file(path / "model.safetensors")[name]
    respelt(path, **{name: stored.to(getattr(torch, kind))})
    for use in (lambda: load_draft(path, qwen), lambda: inspect_draft(path)):
        with pytest.raises(
            CheckpointError, match=f"{name} is stored as .*, and it must be of whole"
        ) as found:
            use()
        assert "d2t as int64, t2d as bool" in str(found.value)
    with pytest.raises(CheckpointError, match=f"{name} is stored as"):
        export_draft(path, "vllm", tmp_path / "out")


@pytest.mark.parametrize("offsets", [torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("members", [torch.uint8, torch.int32, torch.bool])
def test_maps_in_another_format_of_whole_numbers_mean_the_same(
    qwen: Target, tmp_path: Path, offsets: torch.dtype, members: torch.dtype
) -> None:
    path, kept = reduced_draft("eagle3", tmp_path / "d")
    stored = load_file(path / "model.safetensors")
    respelt(path, d2t=stored["d2t"].to(offsets), t2d=stored["t2d"].to(members))
    assert torch.equal(load_draft(path, qwen).head.kept, kept)
    export_draft(path, "deepspec", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["d2t"], stored["d2t"]) and written["d2t"].dtype == torch.int64
    assert torch.equal(written["t2d"], stored["t2d"]) and written["t2d"].dtype == torch.bool


@pytest.mark.parametrize(("kind", "vocabulary", "fits"), [
    ("I16", 32768, True), ("I16", 32769, False), ("int16", 151936, False), ("U16", 65536, True),
    ("I32", 151936, True), ("int64", 151936, True), ("uint8", 257, False),
    ("BF16", 96, False), ("BOOL", 96, False), ("F8_E4M3", 96, False),
])  # fmt: skip
def test_offsets_that_would_wrap_around_are_refused(
    tmp_path: Path, kind: str, vocabulary: int, fits: bool
) -> None:
    spec = replace(load_spec(reduced_draft("dflash", tmp_path / "d")[0]), vocab_size=vocabulary)
    with nullcontext() if fits else pytest.raises(CheckpointError, match=f"d2t is stored as {kind}"):
        check_formats(tmp_path, spec, {"d2t": kind, "t2d": "BOOL"})


@pytest.mark.parametrize("change", ["d2t one short", "t2d one short", "past the end", "below 0"])
def test_maps_of_the_wrong_length_or_out_of_range_are_refused_by_every_reader(
    qwen: Target, tmp_path: Path, change: str
) -> None:
    path, _ = reduced_draft("dspark", tmp_path / "d")
    stored = load_file(path / "model.safetensors")
    d2t = stored["d2t"].clone()
    if change in ("past the end", "below 0"):
        d2t[-1 if change == "past the end" else 0] = V if change == "past the end" else -1
        del stored["t2d"]
        save_file(stored | {"d2t": d2t}, path / "model.safetensors", metadata={"format": "pt"})
        message = "does not map the draft's vocabulary to distinct ids"
    else:
        name = change.split()[0]
        respelt(path, **{name: stored[name][:-1].clone()})
        message = f"{name} has the shape"
    for use in (lambda: load_draft(path, qwen), lambda: export_draft(path, "vllm", tmp_path / "out")):
        with pytest.raises(CheckpointError, match=message):
            use()


@pytest.mark.parametrize("kind", ["eagle3", "dflash", "dspark"])
@pytest.mark.parametrize("maps", ["both", "d2t", "t2d"])
def test_maps_of_a_whole_vocabulary_that_map_each_id_to_itself_change_nothing(
    qwen: Target, seen: tuple[Tensor, list[int]], tmp_path: Path, kind: str, maps: str
) -> None:
    path, _ = reduced_draft(kind, tmp_path / "d")
    config = json.loads((path / "config.json").read_text("utf-8")) | {"draft_vocab_size": V}
    names = eagle_names() if kind == "eagle3" else block_names(markov_rows=V if kind == "dspark" else None)
    tensors = random_tensors(names)
    identity = {"d2t": torch.zeros(V, dtype=torch.int64), "t2d": torch.ones(V, dtype=torch.bool)}
    kept = identity if maps == "both" else {maps: identity[maps]}
    want = propose(load_draft(write(tmp_path / "plain", config, tensors), qwen), *seen)
    with_maps = write(tmp_path / "maps", config, tensors | kept)
    draft = load_draft(with_maps, qwen)
    assert draft.head.kept is None
    assert propose(draft, *seen)[0] == want[0]
    assert inspect_draft(with_maps)["draft_vocabulary"] == V
    export_draft(with_maps, "deepspec", tmp_path / "out")
    assert not {"d2t", "t2d"} & load_file(tmp_path / "out" / "model.safetensors").keys()


@pytest.mark.parametrize("spoil", ["ids", "reordered", "members"])
def test_maps_of_a_whole_vocabulary_that_are_not_the_identity_are_refused(
    qwen: Target, tmp_path: Path, spoil: str
) -> None:
    offsets, members = torch.zeros(V, dtype=torch.int64), torch.ones(V, dtype=torch.bool)
    if spoil == "ids":
        offsets = torch.arange(V)
    elif spoil == "reordered":
        offsets[0], offsets[1] = 1, -1
    else:
        members[5] = False
    tensors = random_tensors(block_names()) | {"d2t": offsets, "t2d": members}
    path = write(tmp_path / "d", speculators("dflash"), tensors)
    with pytest.raises(CheckpointError, match="is not reduced, so each id must map to itself"):
        load_draft(path, qwen)


def test_spec_of_a_foreign_checkpoint_needs_no_target(tmp_path: Path) -> None:
    path, _ = reduced_draft("dspark", tmp_path / "d")
    spec = load_spec(path)
    assert (spec.num_target_layers, spec.draft_vocab_size, spec.vocab_size) == (None, K, V)
