"""Drafts as GGUF files: tensors, keys and tokenizer; what is refused; and what is read back.

With $DEEPSPEC_LLAMA_CPP, the path of llama.cpp's source, the files are compared with its converter's (which
needs the package sentencepiece); with $DEEPSPEC_REAL, the folder of a finished `make real`, its drafts are
compared, too. tests/test_servers.py serves them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from deepspec.checkpoints.draft import load_draft, new_draft, save_draft
from deepspec.checkpoints.export import export_draft
from deepspec.checkpoints.gguf_draft import export_gguf, inspect_gguf
from deepspec.checkpoints.gguf_tokenizer import GPT2, SPLITTING, _splitting
from deepspec.cli import app
from deepspec.errors import CheckpointError, MismatchError, UserError
from deepspec.pocket import packaged
from deepspec.targets import Target, TargetSpec

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
np = pytest.importorskip("numpy")

DRAFTS = ("pocket-eagle3-portable", "pocket-dflash", "pocket-dspark")
SOURCE = os.environ.get("DEEPSPEC_LLAMA_CPP")
REAL = os.environ.get("DEEPSPEC_REAL")
DRIVER = Path(__file__).parent.parent / "benchmarks" / "llamacpp_convert.py"
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


@pytest.fixture(scope="module")
def pocket() -> Target:
    return Target.from_pretrained("pocket", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def files(pocket: Target, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float32 file of each draft."""
    folder = tmp_path_factory.mktemp("gguf")
    for name in DRAFTS:
        export_gguf(name, folder / f"{name}.gguf", pocket, dtype="float32")
    return folder


def reduced(name: str, pocket: Target, folder: Path, rows: int = 512) -> Path:
    """A shipped draft whose head keeps only so many of the target's ids, spread over all of them."""
    draft = load_draft(name, pocket)
    kept = range(3, 4096, 4096 // rows)
    other = new_draft(replace(draft.spec, draft_vocab_size=rows), pocket, kept=list(kept))
    weights = {k: v for k, v in draft.state_dict().items() if "markov_w2" not in k}
    other.load_state_dict(weights, strict=False)
    save_draft(other, folder / f"{name}-{rows}", pocket, {})
    return folder / f"{name}-{rows}"


def keys_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors_of(path: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def expected(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """What one tensor of an export for llama.cpp is in GGUF."""
    words = {
        r"^(midlayer|layers\.0)\.": "blk.0.",
        r"^layers\.": "blk.",
        r"self_attn\.(\w)_proj": r"attn_\1",
        "attn_o": "attn_output",
        r"self_attn\.(\w)_norm": r"attn_\1_norm",
        r"mlp\.(\w+)_proj": r"ffn_\1",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        r"^hidden_norm": "enc.output_norm",
        r"\.hidden_norm": ".attn_norm_2",
        r"^norm": "output_norm",
        r"markov_head\.": "",
        r"confidence_head\.proj": "conf_proj",
    }
    found = name
    for pattern, word in words.items():
        found = re.sub(pattern, word, found)
    if name.startswith("midlayer") and re.search("attn_[qk]", found):  # llama.cpp rotates neighbours
        rows = [
            h * 32 + half * 16 + i for h in range(len(tensor) // 32) for i in range(16) for half in (0, 1)
        ]
        tensor = tensor[rows]
    return found, tensor


@pytest.mark.parametrize("name", DRAFTS)
def test_file_holds_the_drafts_tensors(pocket: Target, files: Path, tmp_path: Path, name: str) -> None:
    export_draft(name, "llamacpp", tmp_path / "out", target=pocket, dtype=torch.float32)
    want = dict(expected(*pair) for pair in load_file(tmp_path / "out" / "model.safetensors").items())
    found = tensors_of(files / f"{name}.gguf")
    assert found.keys() == want.keys()
    for key, tensor in want.items():
        assert found[key].tensor_type.name == "F32"
        assert tuple(found[key].shape)[::-1] == tuple(tensor.shape), key
        assert np.array_equal(found[key].data, tensor.numpy()), key


@pytest.mark.parametrize("name", DRAFTS)
def test_reduced_vocabulary_is_the_head_and_the_targets_ids(
    pocket: Target, tmp_path: Path, name: str
) -> None:
    """Offsets in place of ids, as in the checkpoint, would make llama.cpp propose other tokens."""
    draft = reduced(name, pocket, tmp_path)
    export_gguf(draft, tmp_path / "draft.gguf", pocket, dtype="q8_0")
    found = tensors_of(tmp_path / "draft.gguf")
    assert (found["d2t"].tensor_type.name, found["output.weight"].tensor_type.name) == ("I64", "Q8_0")
    assert found["d2t"].data.tolist() == list(range(3, 4096, 8))
    assert "t2d" not in found and list(found)[-1] == "d2t"
    head = gguf.quants.dequantize(found["output.weight"].data, found["output.weight"].tensor_type)
    kept = pocket.head.weight[3::8].numpy()
    assert np.abs(head - kept).max() <= np.abs(kept).max() / 127
    if "markov_w2.weight" in found:
        assert found["markov_w2.weight"].shape[1] == 512
    facts = inspect_gguf(tmp_path / "draft.gguf", pocket.spec)
    assert (facts["vocabulary"], facts["draft_vocabulary"], facts["fits"]) == (4096, 512, True)
    # It used to be refused as if its head were a copy of the target's, and block drafts were exported without
    # the size.
    config = export_draft(draft, "vllm", tmp_path / "vllm", target=pocket).path / "config.json"
    assert json.loads(config.read_text())["draft_vocab_size"] == 512


def test_keys_say_what_the_draft_is(files: Path) -> None:
    keys = keys_of(files / "pocket-dspark.gguf")
    assert keys["general.architecture"] == "dflash"
    assert keys["dflash.target_layers"] == [2, 4, 6, 8, 10]
    assert (keys["dflash.block_size"], keys["dflash.sample_from_anchor"]) == (7, True)
    assert keys["dflash.attention.causal"] is False and keys["dflash.has_confidence_head"] is True
    assert keys["dflash.context_length"] == 1024
    assert keys["tokenizer.ggml.mask_token_id"] == 5
    assert keys_of(files / "pocket-dflash.gguf")["dflash.has_confidence_head"] is False
    keys = keys_of(files / "pocket-eagle3-portable.gguf")
    assert (keys["eagle3.target_layers"], keys["eagle3.target_hidden_size"]) == ([2, 6, 10], 192)
    assert "tokenizer.ggml.mask_token_id" not in keys


def test_tokenizer_is_the_targets(pocket: Target, files: Path) -> None:
    keys, tokenizer = keys_of(files / "pocket-eagle3-portable.gguf"), pocket.spec.tokenizer()
    assert tokenizer is not None
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    assert keys["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(4096))
    assert keys["tokenizer.ggml.token_type"] == [3] * 6 + [1] * 4090
    assert len(keys["tokenizer.ggml.merges"]) == 3834
    assert (keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.add_bos_token"]) == (2, False)
    assert keys["tokenizer.chat_template"] == tokenizer.chat_template


@pytest.mark.parametrize(("dtype", "kind"), [("float16", "F16"), ("q8_0", "Q8_0"), (None, "BF16")])
def test_matrices_have_the_format_that_was_asked_for(
    pocket: Target, files: Path, tmp_path: Path, dtype: str | None, kind: str
) -> None:
    out = tmp_path / "draft.gguf"
    assert export_gguf("pocket-dflash", out, pocket, dtype=dtype).dtype == kind
    whole = tensors_of(files / "pocket-dflash.gguf")
    for name, tensor in tensors_of(out).items():
        matrix = len(tensor.shape) > 1
        # Rows of the zero head are 8 wide, and Q8_0 has blocks of 32.
        narrow = kind == "Q8_0" and tensor.shape[0] % 32
        assert tensor.tensor_type.name == ("F32" if not matrix else "F16" if narrow else kind), name
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        limit = np.abs(whole[name].data).max() / (127 if kind == "Q8_0" else 2000)
        assert np.abs(values - whole[name].data).max() <= limit, name


@pytest.mark.parametrize("name", DRAFTS)
def test_tokenizer_is_copied_from_the_targets_gguf_file(
    pocket: Target, files: Path, tmp_path: Path, name: str
) -> None:
    """Another draft's file stands for the target's: its tokenizer is the same."""
    other = files / f"{DRAFTS[name == DRAFTS[0]]}.gguf"
    found = export_gguf(name, tmp_path / "it's.gguf", pocket, dtype="float32", served=other)
    want = keys_of(files / f"{name}.gguf")
    if name == DRAFTS[0]:  # the other's mask comes along
        want |= {"tokenizer.ggml.mask_token_id": 5, "GGUF.kv_count": want["GGUF.kv_count"] + 1}
    assert keys_of(found.path) == want
    (line,) = found.launch
    assert shlex.split(line)[:5] == ["llama-server", "-m", str(other), "-md", str(found.path)]


def test_gguf_file_of_another_target_is_refused(pocket: Target, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(MismatchError, match="has 2 tokens"):
        export_gguf("pocket-dflash", tmp_path / "draft.gguf", pocket, served=tmp_path / "other.gguf")
    with pytest.raises(UserError, match="is not a draft"):  # and the file of a target is never replaced
        export_gguf("pocket-dflash", tmp_path / "other.gguf", pocket)
    with pytest.raises(CheckpointError, match="its architecture is llama"):
        inspect_gguf(tmp_path / "other.gguf")
    (tmp_path / "torn.gguf").write_bytes((tmp_path / "other.gguf").read_bytes()[:40])
    with pytest.raises(CheckpointError, match="can be read"):
        inspect_gguf(tmp_path / "torn.gguf")


def test_file_is_whole_or_not_there(pocket: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    with pytest.raises(RuntimeError, match="killed"):
        export_gguf("pocket-dflash", tmp_path / "draft.gguf", pocket)
    assert list(tmp_path.iterdir()) == []


# ── how a tokenizer splits text ───────────────────────────────────────────────────────────────────────


def tokenizer_file(*steps: dict[str, Any], model: str = "BPE") -> dict[str, Any]:
    return {
        "model": {"type": model},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)},
        "decoder": {"type": "ByteLevel"},
    }


@pytest.mark.parametrize(("expressions", "name"), [(e, n) for e, n in SPLITTING.items() if len(e) == 1])
def test_splitting_is_recognised_by_its_expression(expressions: tuple[str, ...], name: str) -> None:
    facts = tokenizer_file({**SPLIT, "pattern": {"Regex": expressions[0]}}, LEVEL)
    assert _splitting(facts, None) == name
    with pytest.raises(UserError, match="not known here") as caught:
        _splitting(tokenizer_file({**SPLIT, "pattern": {"Regex": expressions[0] + "|x"}}, LEVEL), None)
    assert "--pre NAME" in str(caught.value) and "--target-gguf" in str(caught.value)
    assert _splitting(tokenizer_file({**SPLIT, "pattern": {"Regex": "x"}}, LEVEL), "mine") == "mine"


def test_splitting_of_byte_level_steps() -> None:
    whole, digits = LEVEL | {"use_regex": True}, {"type": "Digits", "individual_digits": True}
    assert _splitting(tokenizer_file(digits, whole), None) == "smollm"
    assert _splitting(tokenizer_file(whole) | {"pre_tokenizer": whole}, None) == "gpt-2"
    for other in (whole | {"add_prefix_space": True}, digits | {"individual_digits": False}):
        with pytest.raises(UserError, match="not known here"):
            _splitting(tokenizer_file(other, LEVEL), None)
    with pytest.raises(UserError, match=r"\(Unigram\) is not a byte-level BPE"):
        _splitting(tokenizer_file(whole, model="Unigram"), "gpt-2")


@pytest.mark.skipif(SOURCE is None, reason="$DEEPSPEC_LLAMA_CPP does not name llama.cpp's source")
def test_expressions_are_llama_cpps() -> None:
    code = (Path(str(SOURCE)) / "src" / "llama-vocab.cpp").read_text("utf-8").replace("\\\\", "\\")
    for expressions, name in SPLITTING.items():
        assert f'tokenizer_pre == "{name}"' in code
        for expression in expressions:  # what GPT-2's ends with changes nothing there
            assert expression.removesuffix(r"|\s+") in code if expression == GPT2 else expression in code


# ── the commands ──────────────────────────────────────────────────────────────────────────────────────


def test_command_writes_the_file_and_prints_how_to_serve_it(tmp_path: Path) -> None:
    out = tmp_path / "draft.gguf"
    for to in ("gguf", "llamacpp"):  # a second export replaces the first
        found = run("export", "pocket-dspark", "--to", to, "--target", "pocket", "--out", str(out))
        assert found.exit_code == 0, found.output
        assert "Qwen3DSparkModel, BF16, 1,496,577 parameters" in found.stdout
        assert f"llama-server -m target.gguf -md {out} --spec-type draft-dspark" in found.stdout
        assert f"convert_hf_to_gguf.py {packaged('pocket')} --outfile target.gguf" in found.stdout
    shown = run("inspect", str(out), "--target", "pocket")
    assert shown.exit_code == 0, shown.output
    facts = dict(line.split("  ", 1) for line in shown.stdout.splitlines())
    assert {key: value.strip() for key, value in facts.items()}.items() >= {
        "algorithm": "dspark",
        "feature layers": "1, 3, 5, 7, 9",
        "proposals per round": "7",
        "sequential head": "vanilla, rank 64",
        "stored as": "BF16+F32",
        "parameters": "1,496,577",
        "fits": "yes",
    }.items()


def test_inspect_says_why_a_file_does_not_fit(files: Path, targets: dict[str, Target]) -> None:
    spec: TargetSpec = targets["qwen3"].spec
    found = inspect_gguf(files / "pocket-eagle3-portable.gguf", spec)
    assert (found["algorithm"], found["feature_layers"], found["fits"]) == ("eagle3", [1, 5, 9], False)
    assert found["reasons"][0].startswith("hidden width: the draft has 192, the target ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--to", "gguf", "--out", "a.gguf"), "add --target T"),
        (("--to", "gguf", "--out", "a", "--target", "pocket"), "ends in .gguf"),
        (("--to", "vllm", "--out", "a", "--dtype", "q8_0"), "add --to gguf"),
        (("--to", "llamacpp", "--out", "a", "--pre", "qwen2"), "add --to gguf"),
        (("--to", "gguf", "--out", "a.gguf", "--target", "pocket", "--target-gguf", "no.gguf"), "no.gguf"),
        (("--to", "gguf", "--out", "a.gguf", "--target-gguf", "b.gguf", "--pre", "c"), "one of them"),
    ],
)
def test_command_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found = run("export", "pocket-dflash", *words)
    assert found.exit_code == 2 and said in found.stderr, found.output
    assert list(tmp_path.iterdir()) == []


def test_draft_that_llama_cpp_cannot_run_is_refused(pocket: Target, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="per-head norms"):
        export_gguf("pocket-eagle3", tmp_path / "draft.gguf", pocket)


def test_missing_package_is_named(pocket: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"deepspec\[gguf\]"):
        export_gguf("pocket-dflash", tmp_path / "draft.gguf", pocket)


# ── llama.cpp's converter ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(SOURCE is None, reason="$DEEPSPEC_LLAMA_CPP does not name llama.cpp's source")
@pytest.mark.parametrize(
    ("name", "dtype", "theirs"),
    [(name, "float32", "f32") for name in DRAFTS]
    + [(name, None, "auto") for name in DRAFTS]
    + [("pocket-dspark", "float16", "f16"), ("pocket-dflash", "q8_0", "q8_0")]
    + [(f"{name}, reduced", *kinds) for name in DRAFTS for kinds in (("float32", "f32"), ("q8_0", "q8_0"))],
)
def test_file_equals_the_converters(
    pocket: Target, tmp_path: Path, name: str, dtype: str | None, theirs: str
) -> None:
    pytest.importorskip("sentencepiece", reason="llama.cpp's converter needs it")
    if name.endswith("reduced"):
        name = str(reduced(name.split(",")[0], pocket, tmp_path / "small"))
    check_against_converter(name, pocket, packaged("pocket"), tmp_path, dtype, theirs)


@pytest.mark.skipif(SOURCE is None or REAL is None, reason="$DEEPSPEC_REAL names no folder of `make real`")
@pytest.mark.parametrize("name", ["dspark", "dflash", "eagle3"])
def test_file_of_a_real_models_draft_equals_the_converters(tmp_path: Path, name: str) -> None:
    folder = Path(str(REAL))
    target = Target.from_pretrained(str(folder / "target"), dtype="float32", device="cpu")
    # A tokenizer that came from a GGUF file does not say that it singles out digits.
    words = (str(folder / "runs" / name), target, str(folder / "target"), tmp_path, "float16", "f16")
    check_against_converter(*words, pre="smollm")


def check_against_converter(
    draft: str,
    target: Target,
    model: str,
    folder: Path,
    dtype: str | None,
    theirs: str,
    pre: str | None = None,
) -> None:
    """The file that we write equals the converter's: keys and their types but for the name, and tensors with
    their order, formats, shapes and bytes."""
    export_draft(draft, "llamacpp", folder / "ours", target=target)
    words = [sys.executable, str(DRIVER), str(SOURCE), str(folder / "ours"), "--outtype", theirs]
    words += ["--target-model-dir", model, "--outfile", str(folder / "theirs.gguf")]
    subprocess.run(words, check=True, capture_output=True)
    export_gguf(draft, folder / "ours.gguf", target, dtype=dtype, pre=pre)
    ours, want = (keys_of(folder / f"{who}.gguf") for who in ("ours", "theirs"))
    assert {k: v for k, v in ours.items() if k != "general.name"} == {
        k: v for k, v in want.items() if k != "general.name"
    }
    kinds = [
        {k: f.types for k, f in gguf.GGUFReader(folder / f"{who}.gguf").fields.items()}
        for who in ("ours", "theirs")
    ]
    assert kinds[0] == kinds[1]
    ours, want = (tensors_of(folder / f"{who}.gguf") for who in ("ours", "theirs"))
    assert list(ours) == list(want)
    for key, tensor in want.items():
        assert ours[key].tensor_type == tensor.tensor_type, key
        assert ours[key].shape.tolist() == tensor.shape.tolist(), key
        assert ours[key].data.tobytes() == tensor.data.tobytes(), key
