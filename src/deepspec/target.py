"""The frozen model that is made faster: features, last hidden states, embedding, head, cached steps.

R rows, Q new tokens per row (padded), S tokens, m captured layers, d hidden, V vocabulary.
Any Hugging Face decoder serves: its modules are found, not re-implemented, and hooks read the
residual stream after chosen layers. The key/value slots are ours (`slots.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.utils import logging as hf_logging

from deepspec import families
from deepspec.drafts.base import Embedding
from deepspec.errors import TargetError
from deepspec.head import Head
from deepspec.pocket import packaged
from deepspec.slots import Rows, SlotStore, causal_rows_mask

NORM_NAMES = ("norm", "final_layernorm", "ln_f", "final_norm")


@dataclass(frozen=True)
class TargetSpec:
    """What is known of a target without its weights. `config` is the raw JSON of its text part."""

    name: str
    config: dict[str, Any]

    @classmethod
    def from_pretrained(cls, name_or_path: str) -> TargetSpec:
        """Read a local directory's or a Hub repository's config.json. Raises TargetError."""
        path = packaged(name_or_path)
        try:
            AutoConfig.from_pretrained(path)
            raw, _ = AutoConfig.for_model("qwen3").get_config_dict(path)
        except (OSError, ValueError, KeyError) as error:
            raise _unreadable(name_or_path, error) from error
        return cls(name_or_path, raw.get("text_config") or raw)

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
    def softcap(self) -> float | None:
        return self.config.get("final_logit_softcapping")

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The target's tokenizer, or None where it has none; loads no weights."""
        return _tokenizer(packaged(self.name))

    @property
    def config_hash(self) -> str:
        """Of the dimensions and facts, not of the name or the library version that wrote the file."""
        volatile = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures")
        facts = {k: v for k, v in self.config.items() if k not in volatile}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _unreadable(name: str, error: Exception) -> TargetError:
    if Path(name).is_dir():
        return TargetError(
            f"{name} is not a model that transformers can load: {str(error).splitlines()[0]}",
            where=str(Path(name) / "config.json"),
            next_step="check that the directory holds config.json and the weights of a Hugging Face decoder",
        )
    text = str(error)
    if "gated" in text or "401" in text or "403" in text:
        return TargetError(
            f"{name} is gated or private on the Hub",
            next_step="accept its licence on its Hub page and run `hf auth login`, or give a local directory",
        )
    return TargetError(
        f"no model {name!r}: not a directory here, and not to be had from the Hub ({text.splitlines()[0]})",
        next_step="give a local directory (download one where there is a network: `hf download ORG/NAME "
        "--local-dir DIR`), a Hub id, or the built-in `pocket`",
    )


def _tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer, or None where it has none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError):
        return None
    # Where the files are missing, some families get a tokenizer that knows its special tokens and no other.
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_tokens) else None


class StepOutput(NamedTuple):
    """last_hidden [R, Q, d] after the final norm; features [R, Q, m*d], or None when none were asked for.
    Row r's real entries are its first len(tokens[r])."""

    last_hidden: Tensor
    features: Tensor | None


class _SlotLayer(CacheLayerMixin):
    """One layer of transformers' cache interface over a `SlotStore`; `rows` is set before each step."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.store = SlotStore()
        self.rows = Rows((0,), (0,), 0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.store.write(key_states, value_states, self.rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.rows.end, 0

    def get_seq_length(self) -> int:
        return max(self.rows.starts)

    def get_max_length(self) -> int:
        return -1


class Target:
    """A spec plus weights: frozen, in eval mode, without autograd."""

    def __init__(
        self, spec: TargetSpec, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.spec = spec
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.decoder: Any = _find_decoder(model, spec.name)
        self._cache = Cache(layers=[_SlotLayer() for _ in range(spec.num_layers)])
        self._lengths: dict[int, int] = {}
        self._captured: dict[int, Tensor] = {}
        self._hooked: tuple[int, ...] = ()
        self._hooks: list[Any] = []

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, dtype: str = "auto", device: str = "auto") -> Target:
        """Load a local directory, a Hub id, or the built-in `pocket`.

        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16". device: "auto" is the
        accelerator when there is one. A missing tokenizer is not an error. Raises TargetError.
        """
        name = str(name_or_path)
        spec = TargetSpec.from_pretrained(name)
        path = packaged(name)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        chosen = "auto" if dtype == "auto" else getattr(torch, dtype)
        shown = hf_logging.is_progress_bar_enabled()
        hf_logging.disable_progress_bar()
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=chosen)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise _unreadable(name, error) from error
        finally:
            if shown:
                hf_logging.enable_progress_bar()
        return cls(spec, model.to(device), _tokenizer(path))

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def vocab_size(self) -> int:
        """Rows of the head: the width of its logits."""
        return self.head.vocab_size

    @property
    def embedding(self) -> Embedding:
        module = self.model.get_input_embeddings()
        return Embedding(module.weight, float(getattr(module, "scalar_embed_scale", 1.0)))

    @property
    def head(self) -> Head:
        module = self.model.get_output_embeddings()
        return Head(module.weight, getattr(module, "bias", None), softcap=self.spec.softcap)

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """End-of-sequence ids of the generation config and the tokenizer; empty without either."""
        found: set[int] = set()
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            found.add(int(self.tokenizer.eos_token_id))
            ids = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
            found.update([ids] if isinstance(ids, int) else ids or [])
        return frozenset(found)

    # ── features of whole rows ────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def read(self, input_ids: Tensor, layers: Sequence[int]) -> StepOutput:
        """Features and last hidden states of right-padded rows [B, S], no cache: one forward pass.

        Attention is causal, so what padding holds changes nothing before it.
        """
        self._hook(tuple(layers))
        output = self.decoder(input_ids=input_ids.to(self.device), use_cache=False)
        return StepOutput(output.last_hidden_state, self._features())

    # ── cached steps over slots ───────────────────────────────────────────────────────────────────

    def open(self, slot: int) -> None:
        """Start an empty sequence in a slot."""
        self._lengths[slot] = 0

    def length(self, slot: int) -> int:
        """Tokens in a slot."""
        return self._lengths[slot]

    def rollback(self, slot: int, length: int) -> None:
        """Forget a slot's tokens from position `length` on."""
        assert 0 <= length <= self._lengths[slot], (
            f"slot {slot} holds {self._lengths[slot]} tokens, not {length}"
        )
        self._lengths[slot] = length

    def free(self, slot: int) -> None:
        del self._lengths[slot]

    @torch.inference_mode()
    def step(
        self, slots: Sequence[int], tokens: Sequence[Sequence[int]], layers: Sequence[int] = ()
    ) -> StepOutput:
        """Append each row's new tokens (any number, not the same) to its slot, in one forward pass.

        What it gives are inference tensors: cheaper by the bookkeeping, and not to be trained on (`read` is).
        """
        width = max(len(t) for t in tokens)
        rows = Rows(tuple(slots), tuple(self._lengths[s] for s in slots), width)
        padded = [list(t) + [t[-1]] * (width - len(t)) for t in tokens]
        self._hook(tuple(layers))
        for layer in self._cache.layers:
            layer.rows = rows
        output = self.decoder(
            input_ids=torch.tensor(padded, device=self.device),
            position_ids=rows.positions(self.device),
            attention_mask=self._mask(rows),
            past_key_values=self._cache,
            use_cache=True,
        )
        for slot, new in zip(slots, tokens, strict=True):
            self._lengths[slot] += len(new)
        return StepOutput(output.last_hidden_state, self._features())

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] last hidden states -> [..., V]."""
        return self.head.logits(hidden)

    @torch.no_grad()
    def transformers_generate(
        self, input_ids: Sequence[int], max_new_tokens: int, temperature: float, stops: Sequence[int]
    ) -> list[int]:
        """New tokens by transformers' own `generate`: the baseline that users already have.

        Greedy at temperature 0; above it, sampling without top-k or top-p from torch's global generator.
        """
        ids = torch.tensor([list(input_ids)], device=self.device)
        self._hook(())
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature if temperature > 0 else None,
            top_k=0 if temperature > 0 else None,
            top_p=1.0 if temperature > 0 else None,
            eos_token_id=list(stops) or None,
            pad_token_id=0,
        )
        return [int(t) for t in output[0, ids.shape[1] :]]

    def _mask(self, rows: Rows) -> Tensor | dict[str, Tensor] | None:
        """None where the model's own mask is right (one row); ours where rows are ragged or partly cached."""
        if len(rows.slots) == 1 and (rows.width == 1 or rows.starts[0] == 0):
            return None
        # The loaded config, not the file: older files leave the layer types to be derived.
        config = self.model.config.get_text_config()
        kinds = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        if kinds is None or "sliding_attention" not in kinds:
            return self._attention_mask(causal_rows_mask(rows, self.device, None if kinds else window))
        return {
            "full_attention": self._attention_mask(causal_rows_mask(rows, self.device)),
            "sliding_attention": self._attention_mask(causal_rows_mask(rows, self.device, window)),
        }

    def _attention_mask(self, seen: Tensor) -> Tensor:
        """In the form that the model's attention takes: eager attention adds its mask to the scores."""
        if self.model.config._attn_implementation != "eager":
            return seen
        unseen = torch.finfo(self.dtype).min
        return torch.zeros(seen.shape, dtype=self.dtype, device=seen.device).masked_fill(~seen, unseen)

    # ── hooks ─────────────────────────────────────────────────────────────────────────────────────

    def _hook(self, layers: tuple[int, ...]) -> None:
        """Capture the outputs of `layers` (-1: the embedding) from the next forward pass on."""
        self._captured.clear()
        if layers == self._hooked:
            return
        if any(not -1 <= i < self.spec.num_layers - 1 for i in layers):
            raise TargetError(
                f"feature layers {list(layers)} do not fit {self.spec.name}, "
                f"which has {self.spec.num_layers} layers",
                next_step=f"use ids from -1 (the embedding) to {self.spec.num_layers - 2}; "
                "the last layer's output is never a feature",
            )
        for hook in self._hooks:
            hook.remove()
        self._hooks = [self._module(i).register_forward_hook(self._keep(i)) for i in layers]
        self._hooked = layers

    def _module(self, layer: int) -> nn.Module:
        return self.model.get_input_embeddings() if layer == -1 else self.decoder.layers[layer]

    def _keep(self, layer: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            self._captured[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def _features(self) -> Tensor | None:
        if not self._hooked:
            return None
        return torch.cat([self._captured[i] for i in self._hooked], dim=-1)


def _find_decoder(model: Any, name: str) -> Any:
    """The module that holds the decoder layers and the final norm. Raises TargetError."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else None
    for candidate in (found, getattr(found, "language_model", None), getattr(model, "model", None)):
        has_layers = isinstance(getattr(candidate, "layers", None), nn.ModuleList)
        if has_layers and any(hasattr(candidate, n) for n in NORM_NAMES):
            return candidate
    raise TargetError(
        f"{name}: could not find the decoder's layers and final norm in {type(model).__name__}",
        next_step="targets must be Hugging Face decoders whose text model has `layers` and a final `norm`",
    )
