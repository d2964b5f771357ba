"""`deepspec inspect`: facts, figures and fit, from config and headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conftest import tiny_draft
from deepspec.checkpoints import draft as checkpoint
from deepspec.checkpoints import inspect as inspection
from deepspec.checkpoints import read
from deepspec.checkpoints.draft import save_draft
from deepspec.checkpoints.inspect import inspect_draft
from deepspec.cli import app
from deepspec.data.template import template_hash
from deepspec.data.tokens import tokenizer_hash
from deepspec.errors import CheckpointError
from deepspec.targets import Target, TargetSpec
from talking import save_talking_llama


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A talking target, and a DSpark draft for it in bfloat16 with its provenance."""
    folder = tmp_path_factory.mktemp("inspect")
    target = Target.from_pretrained(save_talking_llama(folder / "target"), "float32", "cpu")
    assert target.tokenizer is not None
    facts = {
        "target": "talking llama",
        "thinking": False,
        "template_hash": template_hash(target.tokenizer),
        "tokenizer_hash": tokenizer_hash(target.tokenizer),
        "held_out_tau": 2.5,
    }
    save_draft(tiny_draft(target, "dspark"), folder / "draft", target, facts, dtype=torch.bfloat16)
    return folder


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(read, "read_tensors", refuse)
    monkeypatch.setattr(Target, "from_pretrained", refuse)
    monkeypatch.setattr("deepspec.targets.loading.AutoModelForCausalLM.from_pretrained", refuse)


@pytest.mark.usefixtures("nothing_is_loaded")
def test_every_fact_of_a_draft_without_loading_it(scene: Path) -> None:
    found = inspect_draft(scene / "draft", TargetSpec.from_pretrained(str(scene / "target")))
    layer = 3 * 32 * 48 + 2 * 32 * 32 + 2 * 32 * 16 + 2 * 8 + 2 * 32
    vocabulary = found["vocabulary"]
    own = 2 * layer + 3 * 32 * 32 + 2 * 32 + 2 * vocabulary * 8 + (32 + 8 + 1)
    want = {
        "layout": "released",
        "algorithm": "dspark",
        "layers": 2,
        "feature_layers": [0, 1, 2],
        "target_layers": 4,
        "alignment": "anchor-first",
        "proposals_per_round": 4,
        "sequential_head": "vanilla, rank 8",
        "confidence_head": "sees the previous token",
        "draft_vocabulary": vocabulary,
        "mask_token_id": 3,
        "trained_for": "talking llama",
        "thinking": False,
        "held_out_tau": 2.5,
        "stored_as": "BF16",
        "stored_copies": [],
        "parameters": own,
        "parameters_with_embedding_and_head": own + 2 * vocabulary * 32,
        "dtype": "float32",
        "gb_added": 4 * own / 1e9,  # the target's format, not the stored one
        "kv_bytes_per_token": 2 * 2 * 2 * 8 * 4,
        "fits": True,
        "reasons": [],
        "doubts": [],
    }
    assert {name: found[name] for name in want} == want


def test_parameters_are_those_that_loading_gives(scene: Path) -> None:
    found = inspect_draft(scene / "draft")
    target = Target.from_pretrained(scene / "target", "float32", "cpu")
    loaded = checkpoint.load_draft(scene / "draft", target)
    assert found["parameters"] == sum(t.numel() for t in loaded.state_dict().values())
    assert (found["dtype"], found["gb_added"]) == ("BF16", 2 * found["parameters"] / 1e9)
    assert (found["fits"], found["target"]) == (None, None)


def test_misfit_names_every_reason_and_both_sides(scene: Path, target_dirs: dict[str, Path]) -> None:
    found = inspect_draft(scene / "draft", TargetSpec.from_pretrained(str(target_dirs["qwen3"])))
    assert found["fits"] is False
    assert found["reasons"] == [
        "its hidden width is 32, and the target's is 48",
        f"its vocabulary is {found['vocabulary']}, and the target's is 96",
        "it is for a target of 4 layers, and this one has 5",
    ]


def test_other_tokenizer_and_template_are_doubts_with_both_hashes(scene: Path, tmp_path: Path) -> None:
    other = tmp_path / "target"
    save_talking_llama(other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\\n", "assistant: "))
    tokens = json.loads((other / "tokenizer.json").read_text("utf-8"))
    vocabulary = tokens["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokens), "utf-8")
    found = inspect_draft(scene / "draft", TargetSpec.from_pretrained(str(other)))
    assert found["fits"] is True
    assert [d.split(" ")[:5] for d in found["doubts"]] == [
        ["it", "was", "trained", "with", "tokenizer"],
        ["it", "was", "trained", "with", "template"],
    ]
    assert found["tokenizer_hash"][:12] in found["doubts"][0]


def test_loading_beside_another_tokenizer_warns(
    scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(checkpoint, "warn", said.append)
    target = Target.from_pretrained(scene / "target", "float32", "cpu")
    checkpoint.load_draft(scene / "draft", target)
    assert said == []
    facts = json.loads((scene / "draft" / "deepspec.json").read_text("utf-8"))
    other = tmp_path / "draft"
    save_draft(tiny_draft(target, "dspark"), other, target, facts | {"tokenizer_hash": "0123456789abcdef"})
    checkpoint.load_draft(other, target)
    assert len(said) == 1
    assert "trained with tokenizer 0123456789ab, and" in said[0]


def test_broken_checkpoint_is_refused_as_loading_would(scene: Path, tmp_path: Path) -> None:
    path = tmp_path / "draft"
    path.mkdir()
    for file in (scene / "draft").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text("utf-8"))
    (path / "config.json").write_text(json.dumps(config | {"markov_rank": 4}), "utf-8")
    with pytest.raises(CheckpointError, match=r"markov_w1\.weight has the shape \[\d+, 8\], but"):
        inspect_draft(path)
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        inspect_draft(path)


def test_command_prints_the_facts_and_why_it_does_not_fit(scene: Path, target_dirs: dict[str, Path]) -> None:
    def call(*words: object) -> Any:
        return CliRunner().invoke(app, ["inspect", *map(str, words)])

    result = call(scene / "draft", "--target", scene / "target")
    assert result.exit_code == 0, result.output
    lines = {line[:36].strip(): line[36:] for line in result.stdout.splitlines()}
    assert (lines["algorithm"], lines["fits"], lines["thinking"]) == ("dspark", "yes", "no")
    told = call(scene / "draft", "--target", target_dirs["qwen3"])
    assert told.exit_code == 0
    assert "does not fit: its hidden width is 32, and the target's is 48" in told.stdout
    found = json.loads(call(scene / "draft", "--json").stdout)
    assert found == json.loads(json.dumps(inspection.inspect_draft(scene / "draft")))
    missing = call(scene / "nowhere", "--target", "no/such-model")
    assert missing.exit_code == 2
    assert "no draft" in missing.stderr
