"""GGUF files as targets: the same model as from safetensors. The files are written here, with gguf."""

from __future__ import annotations

import json
import re
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from conftest import save_tiny
from deepspec.cli import app
from deepspec.data.tokens import prompt_ids, require_tokenizer, tokenizer_hash
from deepspec.errors import TargetError
from deepspec.targets import Target, TargetSpec
from talking import save_talking_llama

gguf = pytest.importorskip("gguf", reason="the extra `gguf` is not installed")
pytest.importorskip("accelerate", reason="the extra `gguf` is not installed")

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
}
SIZES: dict[str, Any] = {
    "vocab_size": 263,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
MERGES = (("l", "l"), ("Ġ", "t"), ("Ġt", "h"))
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: dict[str, dict[str, Any]] = {
    "llama": {"rope_type": "default", "rope_theta": 1e4},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 8192, "rope_theta": 5e5},
    "qwen3": {"rope_type": "default", "rope_theta": 1e6},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 1e6},
}


def model_of(kind: str) -> Any:
    rope = dict(ROPES[kind])
    if kind.startswith("llama"):
        return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False, rope_parameters=rope))
    config = Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True, rope_parameters=rope)
    return Qwen3ForCausalLM(config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face directories of the models, with the tokenizer of `talking`."""
    root = tmp_path_factory.mktemp("models")
    words = save_talking_llama(root / "words")
    known = json.loads((words / "tokenizer.json").read_text("utf-8"))
    for i, (first, second) in enumerate(MERGES):
        known["model"]["vocab"][first + second] = 256 + i
    for token in known["added_tokens"]:
        token["id"] += len(MERGES)
    known["model"]["merges"] = [list(pair) for pair in MERGES]
    (words / "tokenizer.json").write_text(json.dumps(known), "utf-8")
    for kind in ROPES:
        save_tiny(lambda kind=kind: model_of(kind), root / kind)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (root / kind / name).write_bytes((words / name).read_bytes())
    return {kind: root / kind for kind in ROPES}


def write_gguf(
    folder: Path, path: Path, kind: str = "F32", tokenizer: bool = True, template: bool = True, **writer: Any
) -> dict[str, Tensor]:
    """Write a model as llama.cpp's converter does; returns the weights that the file holds, under the names
    of transformers. Matrices are quantised to `kind`, vectors stay F32."""
    config = json.loads((folder / "config.json").read_text())
    llama, rope = config["model_type"] == "llama", config["rope_parameters"]
    architecture, more = writer.pop("architecture", config["model_type"]), writer.pop("values", {})
    pre = writer.pop("pre", "default")
    out = gguf.GGUFWriter(path, architecture, **writer)
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(config["num_attention_heads"])
    out.add_head_count_kv(config["num_key_value_heads"])
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_rope_freq_base(rope["rope_theta"])
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    out.add_key_length(head)
    more = {"rope.dimension_count": head, **more}
    for key, value in more.items():
        out.add_key_value(f"{architecture}.{key}", value, gguf.GGUFValueType.get_type(value))
    if rope["rope_type"] == "yarn":
        out.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        out.add_rope_scaling_factor(rope["factor"])
        out.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if tokenizer:
        write_tokenizer(out, folder, template, pre)
    held = {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    if rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** -(torch.arange(0, head, 2) / head)
        out.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy())
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        ggml = name
        for theirs, short in NAMES.items():
            ggml = ggml.replace(theirs, short)
        values = tensor.numpy()
        turned = llama and (".attn_q." in ggml or ".attn_k." in ggml)
        if turned:
            heads = config["num_attention_heads" if ".attn_q." in ggml else "num_key_value_heads"]
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        format = gguf.GGMLQuantizationType[kind if tensor.dim() > 1 else "F32"]
        stored = gguf.quants.quantize(values, format)
        out.add_tensor(ggml, stored, raw_dtype=format)
        back = gguf.quants.dequantize(stored, format)
        if turned:
            back = back.reshape(heads, -1, 2, back.shape[1]).swapaxes(1, 2).reshape(back.shape)
        held[name] = torch.from_numpy(back.copy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return held


def write_tokenizer(out: Any, folder: Path, template: bool, pre: str) -> None:
    found = require_tokenizer(TargetSpec.from_pretrained(str(folder)).tokenizer(), "the model")
    vocabulary = sorted(found.get_vocab().items(), key=lambda item: item[1])
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    out.add_token_list([text for text, _ in vocabulary])
    out.add_token_types([3 if i in found.added_tokens_decoder else 1 for _, i in vocabulary])
    out.add_token_merges([" ".join(pair) for pair in MERGES])
    out.add_eos_token_id(found.eos_token_id)
    out.add_pad_token_id(found.pad_token_id)
    if template:
        out.add_chat_template(found.chat_template)


def reference(folder: Path, weights: dict[str, Tensor], out: Path) -> Target:
    """The same weights from safetensors."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    model.load_state_dict(weights, strict=False)
    model.save_pretrained(out)
    return Target.from_pretrained(out, dtype="float32")


def same(ours: Target, theirs: Target) -> None:
    """Features, logits and greedy tokens are equal bit for bit."""
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    a, b = (t.read(ids, [-1, 0, 1]) for t in (ours, theirs))
    assert torch.equal(a.features, b.features)
    assert torch.equal(ours.logits(a.last_hidden), theirs.logits(b.last_hidden))
    greedy = [t.transformers_generate(ids[0].tolist(), 12, 0.0, ()) for t in (ours, theirs)]
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize(
    ("kind", "stored"),
    [
        ("llama", "F32"),
        ("llama", "F16"),
        ("llama", "Q4_0"),
        ("llama3", "F32"),
        ("qwen3", "F32"),
        ("qwen3", "Q8_0"),
        ("yarn", "F32"),
    ],
)
def test_file_is_the_same_model_as_its_safetensors(
    kind: str,
    stored: str,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = write_gguf(folders[kind], tmp_path / "model.gguf", stored)
    target = Target.from_pretrained(tmp_path / "model.gguf")
    theirs = reference(folders[kind], held, tmp_path / "reference")
    assert target.dtype == torch.float32
    assert target.max_length == theirs.max_length
    same(target, theirs)
    if stored == "F32":  # a large file is read where it is, and not copied without its vocabulary
        monkeypatch.setattr("deepspec.targets.gguf.LARGE", 0)
        same(Target.from_pretrained(tmp_path / "model.gguf"), theirs)
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(rf"\d+ in {stored} \(\d+%\).*read as float32", said)


def test_tokenizer_and_template_come_from_the_file(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gguf(folders["llama"], tmp_path / "model.gguf")
    ours = require_tokenizer(TargetSpec.from_pretrained(str(tmp_path / "model.gguf")).tokenizer(), "ours")
    theirs = require_tokenizer(TargetSpec.from_pretrained(str(folders["llama"])).tokenizer(), "theirs")
    messages = [{"role": "user", "content": "naïve  12\n<|im_end|> all the 🙂"}]
    assert prompt_ids(ours, messages, False) == prompt_ids(theirs, messages, False)
    assert (ours.eos_token, ours.chat_template) == (theirs.eos_token, theirs.chat_template)
    assert "splits text" not in capsys.readouterr().err
    write_gguf(folders["llama"], tmp_path / "model.gguf", pre="wonder")
    target = Target.from_pretrained(tmp_path / "model.gguf")
    assert "how the tokenizer 'wonder' splits text" in " ".join(capsys.readouterr().err.split())
    ends = {theirs.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")}
    assert target.stop_token_ids == ends


def test_directory_and_parts_of_a_split_model(folders: dict[str, Path], tmp_path: Path) -> None:
    held = write_gguf(folders["llama"], tmp_path / "tiny.gguf", split_max_tensors=10)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 1
    (tmp_path / "mmproj-tiny.gguf").write_bytes(b"GGUF")
    same(Target.from_pretrained(tmp_path), reference(folders["llama"], held, tmp_path / "reference"))
    with pytest.raises(TargetError, match=r"part 2 of .*\n.*\n.*give the first part"):
        TargetSpec.from_pretrained(str(parts[1]))
    parts[-1].rename(tmp_path / "elsewhere")
    with pytest.raises(TargetError, match=rf"parts of the model are missing: {parts[-1].name}"):
        TargetSpec.from_pretrained(str(parts[0]))
    write_gguf(folders["qwen3"], tmp_path / "other.gguf")
    with pytest.raises(TargetError, match="holds 2 GGUF models"):
        TargetSpec.from_pretrained(str(tmp_path))


def test_convert_writes_the_same_target(folders: dict[str, Path], tmp_path: Path) -> None:
    path, out = tmp_path / "blob", tmp_path / "out"  # Ollama's files have no suffix
    write_gguf(folders["qwen3"], path, "Q8_0")
    done = CliRunner().invoke(app, ["target", "convert", str(path), "--out", str(out)])
    assert done.exit_code == 0, done.output
    ours, theirs = Target.from_pretrained(path), Target.from_pretrained(out)
    assert ours.spec.config_hash == theirs.spec.config_hash
    assert ours.stop_token_ids == theirs.stop_token_ids
    first, second = (require_tokenizer(t.tokenizer, "it") for t in (ours, theirs))
    assert tokenizer_hash(first) == tokenizer_hash(second)
    assert first.chat_template == second.chat_template
    same(ours, theirs)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    for model, place in ((str(path), out), ("pocket", tmp_path / "new")):
        assert CliRunner().invoke(app, ["target", "convert", model, "--out", str(place)]).exit_code == 2
    assert not list(tmp_path.glob(".*"))


def test_file_without_tokenizer_or_template_takes_those_next_to_it(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(folders["llama"], path, tokenizer=False)
    with pytest.raises(TargetError, match=r"has no tokenizer.*\n.*GGUF file"):
        require_tokenizer(TargetSpec.from_pretrained(str(path)).tokenizer(), "it")
    write_gguf(folders["llama"], path, template=False)
    tokenizer = require_tokenizer(TargetSpec.from_pretrained(str(path)).tokenizer(), "it")
    with pytest.raises(TargetError, match="no chat template") as caught:
        prompt_ids(tokenizer, [{"role": "user", "content": "hello"}], False)
    assert caught.value.where == str(path)
    (tmp_path / "chat_template.jinja").write_bytes((folders["llama"] / "chat_template.jinja").read_bytes())
    again = require_tokenizer(TargetSpec.from_pretrained(str(path)).tokenizer(), "it")
    assert prompt_ids(again, [{"role": "user", "content": "hello"}], False)


def test_files_that_are_no_target_say_why(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"

    def refused(match: str) -> None:
        with pytest.raises(TargetError, match=match) as caught:
            TargetSpec.from_pretrained(str(path))
        assert caught.value.next_step

    write_gguf(folders["llama"], path)
    whole = path.read_bytes()
    for length in (5, 100, 2000):
        path.write_bytes(whole[:length])
        refused("torn: its header does not end")
    path.write_bytes(whole[:-4000])
    refused("torn: it has .* bytes, and its header describes")
    for content, match in (
        (b"", "not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1", "LFS pointer"),
    ):
        path.write_bytes(content)
        refused(match)
    path.write_bytes(whole[:4] + struct.pack(">I", 3) + whole[8:])
    refused("big-endian")
    strangers = {"eagle3": "is a draft", "clip": "the image", "wonder": "architecture 'wonder'"}
    for architecture, match in strangers.items():
        write_gguf(folders["llama"], path, architecture=architecture)
        refused(match)
    stretched = {"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}
    write_gguf(folders["qwen3"], path, values=stretched)
    refused("stretches its rotary positions by 'longrope'")
    write_gguf(folders["qwen3"], path, values={"rope.dimension_count": 16})
    refused("turns 16 of 32 numbers of a head")
    write_gguf(folders["qwen3"], path)
    path.write_bytes(path.read_bytes().replace(b"blk.0.attn_q_norm.weight", b"blk.0.attn_q_what.weight"))
    with pytest.raises(TargetError, match=r"the file has none for model.layers.0.self_attn.q_norm"):
        Target.from_pretrained(path)


def test_missing_packages_are_named(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(folders["llama"], tmp_path / "model.gguf")
    monkeypatch.setattr("deepspec.targets.gguf_file.find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"needs gguf and accelerate\n.*pip install 'deepspec\[gguf\]'"):
        TargetSpec.from_pretrained(str(tmp_path / "model.gguf"))
    assert "gguf" in sys.modules
