"""GGUF files as targets, through transformers' own reader: config, tokenizer and weights.

The reader is given a short copy of the header for the config and the tokenizer, because it takes seconds for
a large vocabulary, and all parts of a split model as one file. What it leaves out of the config is added.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from deepspec.errors import TargetError
from deepspec.files import is_disk_full
from deepspec.log import note, warn
from deepspec.targets.gguf_file import EMBEDDING, Gguf, Stored
from deepspec.targets.hub import first_line

FILE = "model.gguf"
TOKENS = "tokenizer.ggml.tokens"
VOCABULARY = ("tokenizer.ggml.token", "tokenizer.ggml.merges", "tokenizer.ggml.scores", "tokenizer.chat")
LEFT_OUT = {
    "attention.key_length_swa": "head_dim",  # of Gemma 4, whose `key_length` has another name in the config
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "expert_feed_forward_length": "moe_intermediate_size",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Keys that transformers' reader leaves out for some architectures, and their names in a config."""
OF_27B = {"gemma2": 46, "gemma3": 62}
"""Layers of a family's largest model, whose queries are scaled otherwise; its file does not say so."""
LARGE = 4 << 30
"""Bytes from which copying a file takes longer than reading its vocabulary."""
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every published Llama 3 says; its GGUF file holds the factors that follow from it, and not these."""
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
END_TEXTS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<end_of_turn>",
    "<turn|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
)
"""Control tokens that end an answer in llama.cpp, whatever the file says."""
CONTROL = 3
GPT2_SPLITS = ("default", "gpt-2", "smollm", "starcoder", "refact", "command-r", "phi-2", "mpt", "olmo")
"""Tokenizers that split text as GPT-2 does, or also single out digits, which their merges never join."""
ORIGINAL = "give the Hugging Face checkpoint that the file was made from"


def gguf_config(gguf: Gguf, name: str) -> Any:
    """The config of the model. Raises TargetError for an architecture or positions that cannot be read."""
    try:
        try:
            raw = _raw_config(gguf, without=VOCABULARY)
        except KeyError:  # some architectures look the vocabulary up
            raw = _raw_config(gguf)
        raw |= {k: float(str(np.float32(v))) for k, v in raw.items() if isinstance(v, float)}
        known = AutoConfig.for_model(raw["model_type"])
        for key, ours in LEFT_OUT.items():
            if (said := gguf.value(key)) is not None and ours not in raw and hasattr(known, ours):
                raw[ours] = said
        if gguf.value("block_count") == OF_27B.get(gguf.architecture):
            raw["query_pre_attn_scalar"] = raw["hidden_size"] // raw["num_attention_heads"]
        raw["vocab_size"] = next(t for t in gguf.tensors if t.name == EMBEDDING).dims[-1]
        if scaling := _rope_scaling(gguf, name, raw):
            raw["rope_scaling"] = scaling
        config = AutoConfig.for_model(**{k: v for k, v in raw.items() if k != "_model_name_or_path"})
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        raise unreadable_gguf(name, gguf, error) from error
    if (rotated := gguf.value("rope.dimension_count")) is not None:
        share = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
        whole = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if rotated not in (round(whole * share), getattr(config, "global_head_dim", None)):
            raise _positions(name, gguf, f"turns {rotated} of {whole} numbers of a head")
    return config


def _raw_config(gguf: Gguf, without: tuple[str, ...] = ()) -> dict[str, Any]:
    with _short_copy(gguf, without) as folder, _reader():
        raw, _ = AutoConfig.for_model("qwen3").get_config_dict(str(folder), gguf_file=FILE)
    return dict(raw)


def _rope_scaling(gguf: Gguf, name: str, raw: dict[str, Any]) -> dict[str, Any]:
    """How positions are scaled, which transformers' reader leaves out; empty if they are not."""
    kind, factor = gguf.value("rope.scaling.type"), gguf.value("rope.scaling.factor")
    found = [t for n in ROPE_FACTORS if (t := gguf.tensor(n))]
    if found:
        if found[0].name == "rope_freqs.weight" and (scaling := _llama3(gguf, found[0], raw)) is not None:
            return scaling
        raise _positions(name, gguf, "stretches its rotary positions by factors of its own")
    if kind in (None, "none") or factor in (None, 1.0):
        return {}
    if kind not in ("linear", "yarn"):
        raise _positions(name, gguf, f"stretches its rotary positions by {kind!r}")
    original = gguf.value("rope.scaling.original_context_length")
    more = {"original_max_position_embeddings": original} if kind == "yarn" and original else {}
    return {"rope_type": kind, "factor": factor, **more}


def _llama3(gguf: Gguf, tensor: Stored, raw: dict[str, Any]) -> dict[str, Any] | None:
    """The scaling of Llama 3 from the factors that follow from it; None if they follow from another."""
    factors = torch.frombuffer(bytearray(gguf.data(tensor)), dtype=torch.float32)
    scaling: dict[str, Any] = {"rope_type": "llama3", "factor": float(factors.max()), **LLAMA3}
    waves = 2 * torch.pi * raw["rope_theta"] ** (torch.arange(len(factors)) / len(factors))
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = ((scaling["original_max_position_embeddings"] / waves - low) / (high - low)).clamp(0, 1)
    expected = (1 - smooth) / scaling["factor"] + smooth
    return scaling if torch.allclose(1 / factors, expected, rtol=1e-3) else None


def _positions(name: str, gguf: Gguf, what: str) -> TargetError:
    return TargetError(
        f"{name} {what}, and transformers does not read this from a GGUF file ({gguf.architecture})",
        where=str(gguf.path),
        next_step=ORIGINAL,
    )


def gguf_tokenizer(gguf: Gguf) -> PreTrainedTokenizerBase | None:
    """The tokenizer in the file, with its chat template or the chat_template.jinja next to the file; None if
    the file has none. Raises TargetError for one that cannot be read."""
    if TOKENS not in gguf.values:
        return None
    try:
        with _short_copy(gguf) as folder:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), gguf_file=FILE)
    except Exception as error:  # of many types, as for any broken tokenizer
        raise TargetError(
            f"the tokenizer in the file cannot be read: {first_line(error)}",
            where=str(gguf.path),
            next_step=ORIGINAL,
        ) from error
    if gguf.values.get("tokenizer.ggml.model") == "gpt2":
        _check_split(str(gguf.values.get("tokenizer.ggml.pre", "default")))
    tokenizer.name_or_path = str(gguf.path)
    beside = gguf.path.with_name("chat_template.jinja")
    if not tokenizer.chat_template and beside.is_file():
        tokenizer.chat_template = beside.read_text("utf-8")
    return tokenizer


@cache
def _check_split(kind: str) -> None:
    """Warn, once, of a way to split text into words that transformers' reader replaces by GPT-2's."""
    try:
        table = import_module("transformers.integrations.gguf.gguf_tokenizer_mapping")
        known = (*GPT2_SPLITS, *table.GGUF_PRE_TOKENIZER_SPLITS)
    except (ImportError, AttributeError):  # another version of it
        return
    if kind not in known:
        warn(
            f"transformers does not know how the tokenizer {kind!r} splits text, and does it as GPT-2: "
            "compare its token ids with llama.cpp's (llama-tokenize), or run `deepspec target convert` and "
            "put the model's own tokenizer files into the folder"
        )


def load_gguf(gguf: Gguf, name: str, dtype: str, device: str, device_map: Any) -> Any:
    """The model with plain weights, which can be moved and saved, and with llama.cpp's ends of an answer.
    Raises TargetError if the file and the model do not hold the same tensors."""
    dtype = _dtype(gguf, device) if dtype == "auto" else dtype
    formats = (f"{count} in {kind} ({share:.0%})" for kind, count, share in gguf.formats())
    note(
        f"{name}: {gguf.architecture}; tensors (share of the weights): {', '.join(formats)}; read as {dtype}"
    )
    plain = getattr(transformers, "GgufConfig", None)
    try:
        with _one_file(gguf) as file, _reader():
            model, info = AutoModelForCausalLM.from_pretrained(
                str(file.parent),
                gguf_file=file.name,
                config=gguf_config(gguf, name),
                dtype=dtype,
                device_map=device_map,
                output_loading_info=True,
                **({} if plain is None else {"quantization_config": plain(dequantize=True)}),
            )
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise unreadable_gguf(name, gguf, error) from error
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    held = sum(t.numbers for t in gguf.tensors if t.name not in ROPE_FACTORS and _layer(t) < depth)
    missing, taken = info["missing_keys"], sum(p.numel() for p in model.parameters())
    if missing or held != taken:
        some = f"none for {', '.join(sorted(missing)[:3])}" if missing else f"{held:,} numbers for {taken:,}"
        raise TargetError(
            f"the tensors of {name} are not those of transformers' {model.config.model_type!r}: the file has "
            f"{some}",
            where=str(gguf.path),
            next_step=f"{ORIGINAL}: this variant of {gguf.architecture!r} cannot be read from a GGUF file",
        )
    # It is a plain model now, and must not be refused where quantised ones are: when it is moved or saved.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if model.generation_config is not None:
        model.generation_config.eos_token_id = _ends(gguf) or model.generation_config.eos_token_id
    return model


def _dtype(gguf: Gguf, device: str) -> str:
    """On a CPU float32, which holds every stored number exactly and is fast there. Elsewhere the file's own
    format, or bfloat16 for a quantised one, which takes half the memory."""
    kinds = {kind for kind, _, _ in gguf.formats()}
    own = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    if device == "cpu" or kinds == {"F32"}:
        return "float32"
    return next(iter({own.get(kind, "bfloat16") for kind in kinds - {"F32"}}), "bfloat16")


def _ends(gguf: Gguf) -> list[int]:
    """Ids that end an answer: those that the file names, and those that llama.cpp knows by their text."""
    kinds = gguf.values.get("tokenizer.ggml.token_type") or ()
    texts = enumerate(zip(gguf.values.get(TOKENS) or (), kinds, strict=False))
    named = (gguf.values.get(f"tokenizer.ggml.{key}") for key in ENDS)
    known = {i for i, (text, kind) in texts if kind == CONTROL and text in END_TEXTS}
    return sorted(known | {i for i in named if i is not None})


def _layer(tensor: Stored) -> int:
    """Its layer; -1 if it belongs to none. Layers past the model's depth predict further tokens."""
    parts = tensor.name.split(".")
    return int(parts[1]) if parts[0] == "blk" and parts[1].isdigit() else -1


def unreadable_gguf(name: str, gguf: Gguf, error: Exception) -> TargetError:
    """The error for a file that transformers' reader failed on; a full disk stays what it is."""
    if isinstance(error, OSError) and is_disk_full(error):  # the folder for temporary files
        raise error
    unknown = "not supported" in str(error) or "Unrecognized model" in str(error)
    return TargetError(
        f"transformers cannot read GGUF files of the architecture {gguf.architecture!r}"
        if unknown
        else f"{name} cannot be read by transformers: {first_line(error)}",
        where=str(gguf.path),
        next_step=ORIGINAL + (", or install a newer transformers" if unknown else ""),
    )


# ── what transformers' reader is given ────────────────────────────────────────────────────────────────


@contextmanager
def _short_copy(gguf: Gguf, without: tuple[str, ...] = ()) -> Iterator[Path]:
    """A folder with the header alone: its keys, and tensors of one number under the names of the model's."""
    with tempfile.TemporaryDirectory() as folder:
        with Path(folder, FILE).open("wb") as out:
            gguf.write_header(out, [t._replace(dims=(1,), kind=0, offset=0) for t in gguf.tensors], without)
            out.write(bytes(32))
        yield Path(folder)


@contextmanager
def _one_file(gguf: Gguf) -> Iterator[Path]:
    """The model as one file for as long as it is read: a copy without the vocabulary, on which the reader
    would spend longer than on the weights; or the file itself if it is large and in one part."""
    size = sum(part.path.stat().st_size for part in gguf.parts)
    temporary = tempfile.gettempdir()
    if len(gguf.parts) == 1 and (size > LARGE or size > shutil.disk_usage(temporary).free // 2):
        yield gguf.path.absolute()
        return
    if len(gguf.parts) > 1:
        note(f"the {len(gguf.parts)} parts of {gguf.path.name} are joined in {temporary} to be read")
    with tempfile.TemporaryDirectory() as folder:
        align = int(gguf.values.get("general.alignment", 32))
        tensors, starts, end = [], [], 0
        for i, part in enumerate(gguf.parts):
            starts.append(end)
            tensors += [t._replace(offset=end + t.offset) for t in gguf.tensors if t.part == i]
            end += part.path.stat().st_size - part.data
            end += -end % align
        with Path(folder, FILE).open("wb") as out:
            gguf.write_header(out, tensors, without=("split.", *VOCABULARY))
            data = out.tell()
            for part, start in zip(gguf.parts, starts, strict=True):
                out.seek(data + start)
                with part.path.open("rb") as source:
                    source.seek(part.data)
                    shutil.copyfileobj(source, out, 1 << 24)
        yield Path(folder, FILE)


@contextmanager
def _reader() -> Iterator[None]:
    """transformers' reader without its warnings, without its bar if there is no terminal, and without making
    the same table of names for every module of the model, which takes longer than reading a small one."""
    usual = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    theirs, gguf = import_module("transformers.modeling_gguf_pytorch_utils"), import_module("gguf")
    bar, names = theirs.tqdm, gguf.get_tensor_name_map
    theirs.tqdm = partial(bar, disable=not sys.stderr.isatty())  # type: ignore[attr-defined]
    gguf.get_tensor_name_map = cache(names)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        hf_logging.set_verbosity(usual)
        theirs.tqdm, gguf.get_tensor_name_map = bar, names  # type: ignore[attr-defined]


def text_config(config: Any) -> dict[str, Any]:
    """A config as `config.json` would hold it."""
    return dict(json.loads(config.to_json_string()))
