"""What is known about a target without its weights: dimensions, family, tokenizer.

Planning, inspecting a draft, and choosing a draft's shape need no more than this.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from deepspec import families
from deepspec.errors import TargetError, first_line
from deepspec.pocket import packaged
from deepspec.targets.gguf import gguf_config, gguf_tokenizer, text_config
from deepspec.targets.gguf_file import find_gguf, read_gguf
from deepspec.targets.hub import locate, unreadable

# The keys that decide a draft's shape. Config files leave out values that equal their class's default.
FACTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "final_logit_softcapping",
)
# The keys that decide the context length; their defaults are not facts of a draft.
CONTEXT = ("model_type", "max_position_embeddings", "original_max_position_embeddings", "rope_parameters")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class TargetSpec:
    """What is known about a target without its weights. config: the raw JSON of its text part.

    positions: what its class and file say together about the length of the context. architectures: the class
    names by which servers choose how to run the model.
    """

    name: str
    config: dict[str, Any]
    quantised: bool = False
    positions: Mapping[str, Any] = field(default_factory=dict)
    architectures: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(cls, name_or_path: str) -> TargetSpec:
        """Read the config.json of a local directory or a Hub repository, or the header of a GGUF file.
        Raises TargetError."""
        path = locate(name_or_path)
        file = find_gguf(path)
        try:
            if file is not None:
                loaded = gguf_config(read_gguf(file, name_or_path), name_or_path)
                raw = text_config(loaded)
            else:
                loaded = AutoConfig.from_pretrained(path, trust_remote_code=False)
                raw, _ = AutoConfig.for_model("qwen3").get_config_dict(path)
        except (OSError, ValueError, KeyError) as error:
            raise unreadable(name_or_path, path, error) from error
        if getattr(loaded, "is_encoder_decoder", False):
            raise TargetError(
                f"{name_or_path} is an encoder-decoder ({raw.get('model_type')}): its decoder also reads an "
                "encoder's output, which a draft does not see",
                next_step="use a decoder-only model",
            )
        text = raw.get("text_config") or raw
        defaults = {k: v for k in FACTS if k not in text and (v := _default(loaded, k)) is not None}
        facts = defaults | text
        missing = [k for k in ("vocab_size", "hidden_size", "num_hidden_layers") if facts.get(k) is None]
        if missing:
            raise TargetError(
                f"the config of {name_or_path} has no {', '.join(missing)}",
                where=str(Path(path) / "config.json"),
                next_step="use a Hugging Face decoder; of a composite model, save only the text part",
            )
        quantised = bool(raw.get("quantization_config") or text.get("quantization_config"))
        whole = loaded.get_text_config(decoder=True)
        positions = {key: getattr(whole, key, None) for key in CONTEXT}
        return cls(name_or_path, facts, quantised, positions, tuple(raw.get("architectures") or ()))

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def family(self) -> families.TargetFamily:
        return families.target_family(self.model_type)

    @property
    def num_layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    @property
    def hidden_size(self) -> int:
        return int(self.config["hidden_size"])

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    @property
    def context_length(self) -> int | None:
        """Tokens that it reads; None if neither its config nor its class gives a limit."""
        return families.context_length({**self.positions, **self.config})

    @property
    def softcap(self) -> float | None:
        return self.config.get(families.SOFTCAP)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The target's tokenizer, or None if it has none; no weights are loaded."""
        return read_tokenizer(packaged(self.name))

    @property
    def config_hash(self) -> str:
        """A hash of the dimensions and facts, but not of the name or of the library version that wrote the
        file."""
        volatile = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures")
        facts = {k: v for k, v in self.config.items() if k not in volatile}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _default(config: Any, key: str) -> int | float | None:
    """The value that the config's class assumes if the file has none; None unless it is a single number."""
    try:
        value = getattr(config.get_text_config(decoder=True), key, None)
    except Exception:
        # Values that differ by layer raise an error of their own type on access, not an AttributeError.
        return None
    return value if isinstance(value, int | float) else None


def read_tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer, or None if it has none. Raises TargetError for one that cannot be read."""
    file = find_gguf(path)
    if file is not None:
        found = gguf_tokenizer(read_gguf(file, path))
        if found is not None:
            return found
        path = str(file.parent)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        # Broken files raise errors of many types. Without a vocabulary file there was nothing to read.
        there = any((Path(path) / name).is_file() for name in VOCABULARIES)
        if not (there or isinstance(error, ImportError)):
            return None
        raise TargetError(
            f"the tokenizer cannot be read: {first_line(error)}",
            where=path,
            next_step="copy or download its files again, or install the package that the message names",
        ) from error
    # If the files are missing, some families get a tokenizer that knows only its special tokens.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_tokens) else None
