"""Exported drafts: the keys, names and spellings that servers read, what is refused, and that nothing which
is added changes an output. No server runs here; tests/test_servers.py starts one."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from conftest import tiny_draft
from deepspec.checkpoints.draft import load_draft, new_draft, save_draft
from deepspec.checkpoints.export import export_draft, server_config
from deepspec.checkpoints.read import SHARED, load_provenance
from deepspec.checkpoints.servers import (
    GGUF,
    LIMITS,
    NATIVE,
    SERVED_AS,
    SERVERS,
    Facts,
    launch_commands,
    refuse,
)
from deepspec.cli import app
from deepspec.drafts.base import NeuralDraft, Proposal
from deepspec.drafts.spec import DraftSpec, LayerShape, RopeFacts
from deepspec.errors import MismatchError, UserError
from deepspec.maths.verify import Sampling
from deepspec.targets import Target, TargetSpec
from golden_case import FOLDER
from reference.served import expected_tensors

PORTABLE = FOLDER.parent / "tools" / "portable"
PAGE = Path(__file__).parent.parent / "docs" / "serving.md"
LAYERS = [1, 2, 3]
DRAFTS: dict[str, dict[str, Any]] = {
    "eagle3": {},
    "eagle3-portable": {"qk_norm": False},
    "dflash": {},
    "dspark": {},
    "dspark-gated": {"markov_head": "gated"},
    "dspark-rnn": {"markov_head": "rnn", "confidence": False},
    "dspark-hidden-confidence": {"confidence_with_markov": False},
    "dspark-confidence-only": {"markov_rank": 0, "confidence_with_markov": False},
}
RUNS = {
    "vllm": set(DRAFTS) - {"dspark-gated", "dspark-rnn"},
    "sglang": set(DRAFTS) - {"eagle3"},
    "llamacpp": set(DRAFTS) - {"eagle3", "dspark-gated", "dspark-rnn"},
}
SERVED = [(to, name) for to, names in RUNS.items() for name in sorted(names)]


@pytest.fixture(scope="module")
def qwen(targets: dict[str, Target]) -> Target:
    return targets["qwen3"]


@pytest.fixture(scope="module")
def drafts(qwen: Target) -> dict[str, NeuralDraft]:
    return {
        name: tiny_draft(qwen, name.split("-")[0], target_layer_ids=LAYERS, **facts)
        for name, facts in DRAFTS.items()
    }


@pytest.fixture(scope="module")
def saved(qwen: Target, drafts: dict[str, NeuralDraft], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of each draft."""
    folder = tmp_path_factory.mktemp("drafts")
    for name, draft in drafts.items():
        save_draft(draft, folder / name, qwen, {"target": "tiny"})
    return folder


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text("utf-8"))


def refusal(path: Path, to: str, out: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        export_draft(path, to, out, **options)
    assert not out.exists()
    return str(caught.value)


def propose(draft: NeuralDraft) -> Proposal:
    features = torch.randn(
        1, 3, len(LAYERS) * draft.spec.shape.hidden, generator=torch.Generator().manual_seed(5)
    )
    draft.open(0)
    draft.observe([0], features, [[4, 5, 6]], [[5, 6, 7]])
    return draft.propose([0], [7], Sampling(1.0), torch.full((1, draft.max_proposals), 0.5))


def with_copies(source: Path, out: Path, embedding: Tensor, head: Tensor) -> Path:
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    tensors |= {SHARED[0]: embedding.clone(), SHARED[1]: head.clone()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


# ── what is written ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", DRAFTS)
def test_native_form_loads_bit_for_bit(
    qwen: Target, drafts: dict[str, NeuralDraft], saved: Path, tmp_path: Path, name: str
) -> None:
    export_draft(saved / name, NATIVE, tmp_path / "out")
    loaded = load_draft(tmp_path / "out", qwen)
    assert loaded.spec == drafts[name].spec
    ours, theirs = drafts[name].state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert load_provenance(tmp_path / "out")["target"] == "tiny"


@pytest.mark.parametrize(("to", "name"), SERVED)
def test_file_holds_exactly_what_the_config_makes_a_server_expect(
    qwen: Target, drafts: dict[str, NeuralDraft], saved: Path, tmp_path: Path, to: str, name: str
) -> None:
    """The servers' form of block drafts is one that we read too: zeros that were added must add nothing."""
    found = export_draft(saved / name, to, tmp_path / "out")
    config, tensors = config_of(tmp_path / "out"), load_file(tmp_path / "out" / "model.safetensors")
    assert {k: tuple(t.shape) for k, t in tensors.items()} == expected_tensors(config)
    assert config["dtype"] == "float32"
    assert found.parameters == sum(t.numel() for t in tensors.values())
    assert found.proposals == 4
    assert not set(SHARED) & tensors.keys()
    # Its own tensors, unchanged but for Eagle-3's prefix.
    source = load_file(saved / name / "model.safetensors")
    for key, tensor in source.items():
        key = key.replace("layers.0.", "midlayer.") if "eagle3" in name else key
        there = tensors[key]
        assert torch.equal(there[:, : tensor.shape[1]] if tensor.dim() == 2 else there, tensor), key
    if "eagle3" in name:
        return
    ours, theirs = propose(drafts[name]), propose(load_draft(tmp_path / "out", qwen))
    assert torch.equal(ours.tokens, theirs.tokens)
    torch.testing.assert_close(ours.q, theirs.q)
    if ours.confidence is not None:
        assert theirs.confidence is not None
        torch.testing.assert_close(ours.confidence, theirs.confidence)
    silent = name in ("dflash", "dspark-confidence-only")
    assert any("an all-zero one was added" in n for n in found.notes) == silent
    assert config["architectures"] == ["Qwen3DSparkModel"]


@pytest.mark.parametrize("to", SERVERS)
def test_layer_ids_of_eagle3_are_spelled_both_ways(saved: Path, tmp_path: Path, to: str) -> None:
    """vLLM and llama.cpp read the top-level list and count streams, SGLang the nested one and counts layers;
    off by one is a lower acceptance and no error."""
    export_draft(saved / "eagle3-portable", to, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 3, 4]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert config["num_aux_hidden_states"] == 3
    assert "draft_vocab_size" in config and config["draft_vocab_size"] is None
    assert config["norm_before_residual"] is False
    assert (config["architectures"], config["model_type"]) == (["LlamaForCausalLMEagle3"], "llama")


def test_eagle3_with_norms_goes_to_the_class_that_has_them(saved: Path, tmp_path: Path) -> None:
    export_draft(saved / "eagle3", "vllm", tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert (config["architectures"], config["model_type"]) == (["Eagle3Qwen3ForCausalLM"], "qwen3")


def test_facts_that_servers_read_under_two_names_are_written_under_both(saved: Path, tmp_path: Path) -> None:
    export_draft(saved / "dspark", "vllm", tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["tie_word_embeddings"] is False
    for key in ("block_size", "mask_token_id", "target_layer_ids", "markov_rank", "markov_head_type"):
        assert config[key] == config["dflash_config"][key]


@pytest.mark.parametrize("name", ["dflash", "dspark", "dspark-hidden-confidence"])
@pytest.mark.parametrize("to", SERVERS)
def test_alignment_lies_flat_and_other_facts_of_a_block_lie_flat_and_nested(
    saved: Path, tmp_path: Path, to: str, name: str
) -> None:
    """vLLM refuses a nested `sample_from_anchor: true`; the others read the flat key, or fall back to it."""
    export_draft(saved / name, to, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["sample_from_anchor"] is True
    assert sorted(config["dflash_config"]) == [
        *(
            "block_size",
            "causal",
            "confidence_head_with_markov",
            "enable_confidence_head",
            "markov_head_type",
        ),
        *("markov_rank", "mask_token_id", "target_layer_ids"),
    ]
    assert {k for k, v in config["dflash_config"].items() if config.get(k) != v} == {"causal"}


@pytest.mark.parametrize("names", [(), ("Qwen3Model",)])
@pytest.mark.parametrize("to", [*SERVERS, NATIVE])
def test_target_that_names_no_architecture_for_text_is_warned_about(
    qwen: Target,
    saved: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    to: str,
    names: tuple[str, ...],
) -> None:
    """vLLM then starts a server of embeddings."""
    found = export_draft(saved / "dspark", to, tmp_path / "out", target=qwen)
    assert not any("architectures" in note for note in found.notes)
    monkeypatch.setattr(qwen, "spec", replace(qwen.spec, architectures=names))
    found = export_draft(saved / "dspark", to, tmp_path / "out", target=qwen)
    said = [note for note in found.notes if 'set "architectures": ["Qwen3ForCausalLM"] in it' in note]
    assert len(said) == (to != NATIVE)


def test_packaged_target_names_its_architecture() -> None:
    assert TargetSpec.from_pretrained("pocket").architectures == ("Qwen3ForCausalLM",)


def test_older_alignment_is_dflash_to_the_servers(qwen: Target, tmp_path: Path) -> None:
    spec = replace(
        tiny_draft(qwen, "dflash", target_layer_ids=LAYERS).spec, sample_from_anchor=False, block=5
    )
    save_draft(new_draft(spec, qwen), tmp_path / "draft", qwen, {})
    for to in SERVERS:
        found = export_draft(tmp_path / "draft", to, tmp_path / to)
        config = config_of(tmp_path / to)
        assert config["architectures"] == ["DFlashDraftModel"]
        assert config["sample_from_anchor"] is False
        assert config["dflash_config"].keys() == {"block_size", "mask_token_id", "target_layer_ids", "causal"}
        assert "markov_rank" not in config
        assert (found.proposals, found.notes) == (4, [])


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bfloat16"), (None, "float32")])
def test_dtype_is_as_asked_or_as_stored(
    saved: Path, tmp_path: Path, dtype: torch.dtype | None, name: str
) -> None:
    assert export_draft(saved / "dspark", "vllm", tmp_path / "out", dtype=dtype).dtype == name
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {getattr(torch, name)}
    assert config_of(tmp_path / "out")["dtype"] == name


def portable_spec(algorithm: str, **facts: Any) -> DraftSpec:
    return DraftSpec(
        algorithm=algorithm,
        family="qwen3",
        shape=LayerShape(
            hidden=4096,
            intermediate=12288,
            heads=32,
            kv_heads=8,
            head_dim=128,
            qk_norm=algorithm != "eagle3",
            rope=RopeFacts(theta=1000000.0),
        ),
        num_target_layers=36,
        vocab_size=151936,
        **facts,
    )


@pytest.mark.skipif(not PORTABLE.is_dir(), reason="the portable example configs are not beside the checkout")
@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("eagle3", {"num_layers": 1, "block": 7, "target_layer_ids": (1, 17, 32)}),
        (
            "dflash",
            {
                "num_layers": 5,
                "block": 16,
                "target_layer_ids": (1, 9, 17, 25, 33),
                "mask_token_id": 151669,
                "sample_from_anchor": False,
            },
        ),
        (
            "dspark",
            {
                "num_layers": 5,
                "block": 7,
                "target_layer_ids": (1, 9, 17, 25, 33),
                "mask_token_id": 151669,
                "markov_rank": 256,
                "confidence": True,
            },
        ),
    ],
)
def test_config_says_what_the_examples_that_both_parsers_accept_say(name: str, facts: dict[str, Any]) -> None:
    want = json.loads((PORTABLE / f"{name}.json").read_text("utf-8"))
    found = {**server_config(portable_spec(name, **facts), 40960), "dtype": "bfloat16"}
    if name == "eagle3":
        # The example has a reduced vocabulary; a whole one is null (SGLang takes an int to mean an own head).
        assert found.pop("draft_vocab_size") is None and want.pop("draft_vocab_size") == 32000
    nested = {k: found[k] | want[k] for k in ("dflash_config", "eagle_config") if k in want}
    assert {k: found.get(k) for k in want} == want | nested
    if "dflash_config" in want:
        assert {k: found["dflash_config"][k] for k in want["dflash_config"]} == want["dflash_config"]


# ── copies of the target's tensors ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("to", ["sglang", "llamacpp"])
def test_copies_are_left_out_only_where_the_target_has_the_same(
    qwen: Target, saved: Path, tmp_path: Path, to: str
) -> None:
    """llama.cpp takes a stored embedding for the draft's head: an untied target's draft collapses."""
    path = with_copies(saved / "dspark", tmp_path / "draft", qwen.embedding.weight, qwen.head.weight)
    assert "add --target" in refusal(path, to, tmp_path / "out")
    export_draft(path, to, tmp_path / "out", target=qwen)
    assert not set(SHARED) & load_file(tmp_path / "out" / "model.safetensors").keys()


def test_own_head_is_kept_where_a_server_uses_it(qwen: Target, saved: Path, tmp_path: Path) -> None:
    other = qwen.head.weight + 1
    path = with_copies(saved / "dspark", tmp_path / "draft", qwen.embedding.weight, other)
    for to in ("sglang", "llamacpp"):
        assert "would use the target's" in refusal(path, to, tmp_path / "no", target=qwen)
    for to in ("vllm", NATIVE):
        export_draft(path, to, tmp_path / to, target=qwen)
        tensors = load_file(tmp_path / to / "model.safetensors")
        assert torch.equal(tensors["lm_head.weight"], other)
        assert torch.equal(tensors["embed_tokens.weight"], qwen.embedding.weight)


def test_lone_copy_is_refused(qwen: Target, saved: Path, tmp_path: Path) -> None:
    path = with_copies(saved / "dspark", tmp_path / "draft", qwen.embedding.weight, qwen.head.weight)
    tensors = load_file(path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors")
    assert "embed_tokens.weight is stored without its partner" in refusal(path, NATIVE, tmp_path / "out")


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("to", "name"), [(to, n) for to in RUNS for n in DRAFTS if n not in RUNS[to]])
def test_draft_that_a_server_cannot_run_is_refused_with_the_way_out(
    saved: Path, tmp_path: Path, to: str, name: str
) -> None:
    said = refusal(saved / name, to, tmp_path / "out")
    assert said.startswith(f"{SERVERS[to].title} cannot run this draft:")
    expected = "per-head norms" if name == "eagle3" else "gated or rnn"
    assert expected in said
    assert "  next: " in said and "--to" in said


@pytest.mark.parametrize(
    ("to", "algorithm", "facts", "expected"),
    [
        (
            "llamacpp",
            "eagle3",
            {"qk_norm": False, "target_layer_ids": [1, 3]},
            "exactly three feature layers",
        ),
        ("vllm", "dflash", {"target_layer_ids": [0, 2]}, "the embedding or layer 0"),
        ("sglang", "dspark", {"target_layer_ids": [-1, 2]}, "the embedding or layer 0"),
        ("llamacpp", "dflash", {"target_layer_ids": LAYERS, "qk_norm": False}, "draft.qk_norm=true"),
    ],
)
def test_other_shapes_are_refused(
    qwen: Target, tmp_path: Path, to: str, algorithm: str, facts: dict[str, Any], expected: str
) -> None:
    save_draft(tiny_draft(qwen, algorithm, **facts), tmp_path / "draft", qwen, {})
    assert expected in refusal(tmp_path / "draft", to, tmp_path / "out")


@pytest.mark.parametrize("algorithm", ["eagle3", "dflash", "dspark"])
def test_gemma4_shapes_go_in_the_released_layout_only(
    targets: dict[str, Target], tmp_path: Path, algorithm: str
) -> None:
    target = targets["gemma4"]
    draft = tiny_draft(target, algorithm, target_layer_ids=LAYERS)
    save_draft(draft, tmp_path / "draft", target, {})
    for to in SERVERS:
        assert "Gemma-4-shaped" in refusal(tmp_path / "draft", to, tmp_path / "out")
    export_draft(tmp_path / "draft", NATIVE, tmp_path / "native")
    assert load_draft(tmp_path / "native", target).spec == draft.spec


@pytest.mark.parametrize(
    ("facts", "to", "expected"),
    [
        ({"softcap": 30.0}, "vllm", "soft-caps"),
        ({"shape": {"activation": "gelu"}}, "sglang", "SiLU"),
        ({"shape": {"attention_bias": True}}, "llamacpp", "biases"),
        ({"shape": {"rope": RopeFacts(kind="proportional")}}, "vllm", "rotary"),
    ],
)
def test_facts_of_foreign_checkpoints_are_refused(
    drafts: dict[str, NeuralDraft], facts: dict[str, Any], to: str, expected: str
) -> None:
    spec = drafts["dspark"].spec
    changed = {**facts, "shape": replace(spec.shape, **facts.get("shape", {}))}
    with pytest.raises(UserError, match=expected):
        refuse(to, Facts(replace(spec, **changed), False, None))


def test_reduced_vocabulary_is_not_for_block_drafts_on_sglang(drafts: dict[str, NeuralDraft]) -> None:
    def reduced(name: str) -> Facts:
        return Facts(replace(drafts[name].spec, draft_vocab_size=40), False, None)

    for name in ("dflash", "dspark"):
        with pytest.raises(UserError, match="vocabulary is reduced"):
            refuse("sglang", reduced(name))
    refuse("sglang", reduced("eagle3-portable"))
    refuse("vllm", reduced("dspark"))
    refuse("llamacpp", reduced("dspark"))
    older = reduced("dflash")
    with pytest.raises(UserError, match="older alignment"):
        refuse("llamacpp", older._replace(spec=replace(older.spec, sample_from_anchor=False)))


def test_target_decides_what_the_draft_alone_does_not_show(
    drafts: dict[str, NeuralDraft], qwen: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = Facts(drafts["dspark"].spec, False, qwen)
    refuse("sglang", facts)
    monkeypatch.setitem(qwen.spec.config, "model_type", "qwen2")
    with pytest.raises(UserError, match="Qwen2"):
        refuse("sglang", facts)
    monkeypatch.setattr(qwen, "embedding", replace(qwen.embedding, scale=4.0))
    with pytest.raises(UserError, match="scales its embedding"):
        refuse("vllm", facts)
    monkeypatch.setattr(qwen, "head", replace(qwen.head, scale=0.5))
    with pytest.raises(UserError, match="scales its logits"):
        refuse("vllm", facts)


def test_all_reasons_are_told_at_once(qwen: Target, tmp_path: Path) -> None:
    save_draft(tiny_draft(qwen, "eagle3", target_layer_ids=[0, 1]), tmp_path / "draft", qwen, {})
    said = refusal(tmp_path / "draft", "llamacpp", tmp_path / "out")
    assert said.count("\n  - ") == 3


def test_draft_of_another_target_is_refused(targets: dict[str, Target], saved: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="hidden width"):
        export_draft(saved / "dspark", "vllm", tmp_path / "out", target=targets["llama"])


def test_nothing_but_an_earlier_export_is_replaced(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="something else"):
        export_draft(saved / "dspark", "vllm", tmp_path / "mine")
    with pytest.raises(UserError, match="something else"):
        export_draft(saved / "dspark", NATIVE, saved / "dspark")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"
    export_draft(saved / "dspark", "vllm", tmp_path / "out")
    export_draft(saved / "dflash", "llamacpp", tmp_path / "out")
    assert load_provenance(tmp_path / "out")["exported_to"] == "llamacpp"


# ── commands and page ─────────────────────────────────────────────────────────────────────────────────


def test_launch_commands_can_be_pasted(drafts: dict[str, NeuralDraft]) -> None:
    """Servers do not know our built-in names, and folders may hold spaces and quotes."""
    place = Path("my drafts/it's")
    spec = drafts["dspark"].spec
    vllm = shlex.split(launch_commands("vllm", spec, "some target", place)[0])
    assert vllm[:3] == ["vllm", "serve", "some target"]
    assert json.loads(vllm[-1])["model"] == str(place)
    for to in ("sglang", "llamacpp"):
        words = [
            word for line in launch_commands(to, spec, "some target", place) for word in shlex.split(line)
        ]
        assert {"some target", str(place)} <= set(words)


@pytest.mark.parametrize(
    ("to", "name", "expected"),
    [
        ("vllm", "eagle3", '"method": "eagle3", "model": "out", "num_speculative_tokens": 4'),
        ("vllm", "dflash", '"method": "dspark", "model": "out", "num_speculative_tokens": 4'),
        ("sglang", "eagle3-portable", "EAGLE3 .* --speculative-num-steps 4 .*-num-draft-tokens 5"),
        ("sglang", "dspark", "DSPARK .* --speculative-num-steps 1 .*-num-draft-tokens 5"),
        ("llamacpp", "dspark", "--spec-type draft-dspark --spec-draft-n-max 4"),
    ],
)
def test_launch_commands_count_as_each_server_counts(
    drafts: dict[str, NeuralDraft], to: str, name: str, expected: str
) -> None:
    lines = launch_commands(to, drafts[name].spec, "TARGET", Path("out"))
    assert re.search(expected, lines[-1])
    older = replace(drafts["dflash"].spec, sample_from_anchor=False, block=5)
    assert "--speculative-num-draft-tokens 5" in launch_commands("sglang", older, "T", Path("out"))[0]


def test_command_offers_every_server_and_prints_how_to_start_it(saved: Path, tmp_path: Path) -> None:
    offered = CliRunner().invoke(app, ["export", "--help"]).stdout
    assert "|".join([*SERVERS, GGUF, NATIVE]) in "".join(offered.split())
    words = ["export", str(saved / "dspark"), "--to", "llamacpp", "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.output
    assert "Qwen3DSparkModel, float32" in found.stdout
    assert "llama-server -m target.gguf -md draft.gguf --spec-type draft-dspark" in found.stdout
    again = CliRunner().invoke(app, [*words, "--json"])
    assert json.loads(again.stdout)["launch"][-1].startswith("llama-server")
    words[1] = str(saved / "eagle3")
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2 and "cannot run this draft" in refused.stderr


def test_page_names_every_architecture_and_every_refusal() -> None:
    """A refusal that the page words differently, or leaves out, cannot be looked up."""
    page = PAGE.read_text("utf-8")
    assert [s.architecture for s in SERVED_AS.values() if f"`{s.architecture}`" not in page] == []
    rows = ["| server | reason | what to do instead |", "|---|---|---|"]
    for limit in LIMITS:
        names = limit.servers.split()
        titles = "all" if set(names) == SERVERS.keys() else ", ".join(SERVERS[name].title for name in names)
        rows.append(f"| {titles} | {limit.why} | {limit.instead} |")
    before, rest = page.split("<!-- refused -->\n")
    after = rest.split("<!-- /refused -->")[1]
    expected = before + "<!-- refused -->\n" + "\n".join(rows) + "\n<!-- /refused -->" + after
    if os.environ.get("DEEPSPEC_WRITE_DOCS"):
        PAGE.write_text(expected, "utf-8")
    assert PAGE.read_text("utf-8") == expected, "docs/serving.md is not what the code says: run `make docs`"
