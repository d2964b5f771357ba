"""A target's tokenizer inside a draft's GGUF file: copied from the target's own GGUF file, or written from
its Hugging Face files.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from deepspec.errors import CheckpointError, MismatchError, TargetError, UserError
from deepspec.pocket import packaged
from deepspec.targets import TargetSpec
from deepspec.targets.hub import fetch

FILES = ("*.json", "*.jinja", "merges.txt", "tokenizer.model")
"""The files of a tokenizer on the Hub."""
LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<\uff5c.*\uff5c>|<unused.*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)
"""Added tokens that llama.cpp takes for special ones, whatever their own flag says."""

_CASED = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_HUMP = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_HUMPS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The expression that a tokenizer of kind ByteLevel has built in."""
DIGITS = r"\p{N}"
SPLITTING: dict[tuple[str, ...], str] = {
    (GPT2,): "gpt-2",
    (DIGITS, GPT2): "smollm",
    (_CASED + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,): "qwen2",
    (
        _CASED
        + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "qwen35",
    (_CASED + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,): "llama-bpe",
    (f"{_HUMP}|{_HUMPS}|{DIGITS}{_REST_SLASH}",): "tekken",
    (f"{_HUMP}{_CASED}?|{_HUMPS}{_CASED}?|{DIGITS}{{1,3}}{_REST_SLASH}",): "gpt-4o",
}
"""llama.cpp's name for how a byte-level tokenizer splits text, by the expressions that it applies in turn."""
LLAMAS = ("llama", "mistral", "mixtral")
"""Targets of one converter class, which has two more rules for the tokenizer."""


def import_gguf() -> ModuleType:
    """The package that reads and writes GGUF files. Raises UserError with the command that installs it."""
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise UserError(
            f"GGUF files need the package gguf ({error})", next_step="pip install 'deepspec[gguf]'"
        ) from error


def read_keys(path: Path) -> dict[str, Any]:
    """The keys of a GGUF file with their values. Raises CheckpointError."""
    return {name: field.contents() for name, field in _fields(path).items()}


def _fields(path: Path) -> dict[str, Any]:
    gguf = import_gguf()
    try:
        return dict(gguf.GGUFReader(path).fields)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(
            f"this is not a GGUF file that can be read: {error}",
            where=str(path),
            next_step="copy, download or export it again",
        ) from error


def copied(writer: Any, source: Path, size: int, mask: int | None) -> None:
    """Add the tokenizer of the target's GGUF file as it is. Raises MismatchError if it has another size."""
    fields = _fields(source)
    count = len(fields["tokenizer.ggml.tokens"].data) if "tokenizer.ggml.tokens" in fields else 0
    if count != size:
        raise MismatchError(
            f"the target's GGUF file has {count:,} tokens, and the draft's vocabulary has {size:,}",
            where=str(source),
            next_step="give the GGUF file of the model that the draft was trained for",
        )
    for name, field in fields.items():
        if name.startswith("tokenizer.") and not (mask is not None and name.endswith("mask_token_id")):
            kind = field.types
            sub = kind[-1] if len(kind) > 1 else None
            writer.add_key_value(name, field.contents(), kind[0], sub_type=sub)
    if mask is not None:
        writer.add_mask_token_id(mask)


def written(
    writer: Any, target: TargetSpec, size: int, mask: int | None, pre: str | None, eagle: bool
) -> None:
    """Add a target's byte-level tokenizer from its Hugging Face files. Raises UserError for other kinds."""
    gguf = import_gguf()
    tokenizer = target.tokenizer()
    if tokenizer is None or not tokenizer.is_fast:
        raise TargetError(
            "the target has no tokenizer to put into the file",
            where=target.name,
            next_step="add its tokenizer.json, or give its GGUF file with --target-gguf",
        )
    place = packaged(target.name)
    folder = Path(place) if Path(place).is_dir() else fetch(place, FILES)
    file = folder / "tokenizer.json"
    # The file first: transformers' classes of some families build the splitting themselves.
    facts = json.loads(file.read_text("utf-8") if file.is_file() else tokenizer.backend_tokenizer.to_str())
    tokens, types = _tokens(gguf, tokenizer, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitting(facts, pre))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=True)
    if mask is not None:
        special.special_token_ids["mask"] = mask
    steps = {e["type"] for e in _steps(facts.get("post_processor"), "processors")}
    if "ByteLevel" in steps:  # releases of the package up to 0.19 leave this out
        plain = {"bos": False, "eos": False}
        adds = special.add_special_token
        special.add_special_token = adds | plain if steps == {"ByteLevel"} else plain | adds
    if eagle or target.model_type in LLAMAS:
        file = folder / "tokenizer_config.json"
        prefix = json.loads(file.read_text("utf-8")).get("add_prefix_space") if file.is_file() else None
        if prefix is not None:
            writer.add_add_space_prefix(prefix)
        if size == 49152:  # Granite and SmolLM: their files say otherwise
            special.add_special_token["bos"] = False
    special.add_to_gguf(writer, quiet=True)


def _tokens(gguf: ModuleType, tokenizer: Any, size: int) -> tuple[list[str], list[int]]:
    """(tokens, their types), with names for ids that the tokenizer does not have."""
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    added, kinds = tokenizer.added_tokens_decoder, gguf.TokenType
    tokens, types = [], []
    for i in range(size):
        token, kind = names.get(i), kinds.NORMAL
        if token is None:
            token, kind = f"[PAD{i}]", kinds.UNUSED
        elif i in added:
            if not added[i].normalized:
                token = tokenizer.decode(tokenizer.encode(token, add_special_tokens=False))
            special = added[i].special or LOOKS_SPECIAL.fullmatch(token)
            kind = kinds.CONTROL if special else kinds.USER_DEFINED
            token = token if special else token.replace("▁", " ")
        tokens.append(token)
        types.append(int(kind))
    return tokens, types


def _splitting(facts: dict[str, Any], pre: str | None) -> str:
    """llama.cpp's name for how a tokenizer (its tokenizer.json) splits text; `pre`, if given. Raises
    UserError."""
    byte_level = '"ByteLevel"' in json.dumps([facts.get("pre_tokenizer"), facts.get("decoder")])
    if facts["model"]["type"] != "BPE" or not byte_level:
        raise UserError(
            f"the target's tokenizer ({facts['model']['type']}) is not a byte-level BPE, the only kind that "
            "is written from Hugging Face files",
            next_step="add --target-gguf FILE, the target's own GGUF file: its tokenizer is copied",
        )
    expressions = [_expression(step) for step in _steps(facts.get("pre_tokenizer"), "pretokenizers")]
    found = pre or SPLITTING.get(tuple(e for e in expressions if e))
    if found is None:
        raise UserError(
            "the target's tokenizer splits text in a way whose name in llama.cpp is not known here",
            next_step="add --target-gguf FILE, the target's own GGUF file, whose tokenizer is copied, or "
            "--pre NAME with the value of tokenizer.ggml.pre in such a file",
        )
    return found


def _steps(facts: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    """The steps of a part of a tokenizer.json; `inside` is the name of the list if it is a sequence."""
    if facts is None or facts["type"] != "Sequence":
        return [] if facts is None else [facts]
    return [step for part in facts[inside] for step in _steps(part, inside)]


def _expression(step: dict[str, Any]) -> str | None:
    """The expression by which a step splits text, None if it does not; the kind of a step not known here."""
    kind = str(step["type"])
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex", kind))
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return GPT2 if step.get("use_regex", True) else None
    return DIGITS if kind == "Digits" and step["individual_digits"] else kind
