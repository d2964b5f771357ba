"""The frozen model that is made faster: features, last hidden states, embedding, head, cached steps.

R rows, Q new tokens per row (padded), S tokens, m captured layers, d hidden, V vocabulary.
Any Hugging Face decoder will do: its modules are found, not re-implemented, and hooks read the
residual stream after chosen layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase

from deepspec.errors import NonFiniteError, TargetError
from deepspec.log import note
from deepspec.maths.host import sent
from deepspec.maths.slots import Ints, Ragged, Rows, causal_rows_mask
from deepspec.pocket import packaged
from deepspec.targets.anatomy import (
    final_norm,
    find_decoder,
    find_embedding,
    find_head,
    fuse_norms,
    steady_length,
)
from deepspec.targets.cache import PassingCache, SlotCache, can_roll_back
from deepspec.targets.gguf import load_gguf
from deepspec.targets.gguf_file import find_gguf, read_gguf
from deepspec.targets.lean import LeanDecoder, lean_decoder
from deepspec.targets.loading import load_model, loading_bars, own_device
from deepspec.targets.spec import TargetSpec, read_tokenizer


class StepOutput(NamedTuple):
    """last_hidden [R, Q, d] after the final norm; features [R, Q, m*d], or None when none were asked for.
    Row r's real entries are its first len(tokens[r])."""

    last_hidden: Tensor
    features: Tensor | None


class Target:
    """A spec plus weights: frozen, in eval mode, without autograd.

    cached: whether a step reads its new tokens only. Hybrids with linear attention, convolutions or
    state-space layers carry a running state that cannot be rolled back; their steps read the whole sequence.
    Raises TargetError for a model without the parts that drafts need, or with nothing to roll back.
    """

    def __init__(
        self, spec: TargetSpec, model: Any, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        self.spec = spec
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        # Not the file: older files leave layer types and defaults to be derived.
        self._config = model.config.get_text_config(decoder=True)
        self.cached = can_roll_back(model, self._config, spec.name)
        self.decoder: Any = find_decoder(model, spec.name)
        if model.device.type != "cpu":
            fuse_norms(self.decoder)
        self.embedding = find_embedding(model, self._config, spec.family, spec.name)
        self.head = find_head(model, self._config, spec.family, spec.name, self.device)
        self._cache = SlotCache(spec.num_layers)
        self._steady_length = steady_length(self._config)
        self._tokens: dict[int, list[int]] = {}
        self._captured: dict[int, Tensor] = {}
        self._hooked: tuple[int, ...] = ()
        self._hooks: list[Any] = []
        self._fused = lean_decoder(self.decoder, self._config, self.embedding.weight, self._cache.stores)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        dtype: str = "auto",
        device: str = "auto",
        device_map: str | dict[str, Any] | None = None,
        place: Callable[[Any, str], Any] | None = None,
    ) -> Target:
        """Load a local directory, a GGUF file, a Hub id, or the built-in `pocket`.

        dtype: "auto" (the checkpoint's; of a GGUF file, see docs/targets.md), "float32", "bfloat16" or
        "float16". device: "auto" is the
        accelerator if there is one (under torchrun, each process its own). device_map: as transformers takes
        it ("auto", "balanced", or modules to devices), to spread the layers over several; `device` then has
        no effect. place: (model on the host, name) -> the model where it is to run. A quantised checkpoint is
        loaded as transformers loads it. A missing tokenizer is not an error. Raises TargetError.
        """
        name = str(name_or_path)
        spec = TargetSpec.from_pretrained(name)
        path = packaged(name)
        device = "cpu" if place else own_device() if device == "auto" else device
        file = find_gguf(path)
        if file is not None:
            with loading_bars(path):
                model = load_gguf(read_gguf(file, name), name, dtype, device, device_map)
        else:
            model, device_map = load_model(spec, path, dtype, device, device_map)
        if device_map is None:
            model = place(model, name) if place else model.to(device)
        target = cls(spec, model, read_tokenizer(path))
        target.check_head()
        if not target.cached:
            note(
                f"{name} ({spec.model_type}) has layers whose state cannot be rolled back to a position: "
                "each step reads the whole sequence again. Outputs and accepted lengths are right; speeds, "
                "of plain decoding too, are not what an engine reaches."
            )
        return target

    @property
    def device(self) -> torch.device:
        """Where token ids go in, and features and last hidden states come out."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def vocab_size(self) -> int:
        """Rows of the head: the width of its logits."""
        return self.head.vocab_size

    @torch.no_grad()
    def check_head(self) -> None:
        """Raise TargetError unless `head` of the last hidden state is the model's own logits (two tokens);
        NonFiniteError if these are infinite or NaN."""
        last_hidden: list[Tensor] = []
        self._hook(())
        watch = self.decoder.register_forward_hook(lambda m, i, o: last_hidden.append(o.last_hidden_state))
        try:
            # From the middle of the vocabulary: a padding token's embedding, and so its logits, may be zero.
            ids = torch.tensor([[self.vocab_size // 3, self.vocab_size // 2]], device=self.device)
            theirs = self.model(input_ids=ids, use_cache=False).logits.to(self.device).float()
        finally:
            watch.remove()
        if not theirs.amax(-1).isfinite().all():
            raise NonFiniteError(self.spec.name, "its logits")
        ours = self.logits(last_hidden[0].to(self.device)).float()
        if ours.shape != theirs.shape or (ours - theirs).abs().max() > 0.02 * theirs.abs().max():
            raise TargetError(
                f"{self.spec.name}: the logits of a {self.spec.model_type!r} model are not its head times "
                "its last hidden state; the family puts a factor, a cap or a layer between them that is not "
                "known here",
                next_step="add a row for it to TARGET_FAMILIES in deepspec/families.py (logit_factor)",
            )

    @property
    def max_length(self) -> int | None:
        """Tokens that a sequence may hold: the context length, or what of it has steady rotary frequencies;
        None if the config gives no limit."""
        return min((n for n in (self.spec.context_length, self._steady_length) if n), default=None)

    def room(self, held: int, wanted: int) -> int:
        """How many of `wanted` new tokens fit after `held` ones; none fit if it is below 1."""
        return wanted if self.max_length is None else min(wanted, self.max_length - held)

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """End-of-sequence ids of the tokenizer and of the generation config, which transformers derives from
        the model's config if it has no file of its own; each counts whatever the other says."""
        found: set[int] = set()
        for source in (self.tokenizer, getattr(self.model, "generation_config", None)):
            ids = getattr(source, "eos_token_id", None)
            found.update([ids] if isinstance(ids, int) else ids or [])
        return frozenset(found)

    # ── features of whole rows ────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def read(self, input_ids: Tensor, layers: Sequence[int]) -> StepOutput:
        """Features and last hidden states of right-padded rows [B, S], no cache: one forward pass.

        Attention is causal, so what padding holds changes nothing before it. Raises TargetError for
        sequences past the length up to which the model's positions hold still.
        """
        self._check_length(input_ids.shape[1])
        # On a CPU there is little to gain, and the features stay transformers' own to the last bit.
        if self.device.type != "cpu" and not self._watched and self._lean is not None:
            self._check_layers(layers)
            return StepOutput(*self._lean.read(sent(input_ids, self.device), layers))
        self._hook(tuple(layers))
        cache = PassingCache(self.spec.num_layers) if self.cached else None
        output = self.decoder(input_ids=sent(input_ids, self.device), past_key_values=cache, use_cache=False)
        return self._output(output)

    @torch.no_grad()
    def finish(self, stream: Tensor) -> Tensor:
        """[..., d] residual stream after the last layer -> last hidden state, through the final norm.

        Servers return the residual stream before the norm; this program uses what comes after (method.md 2).
        """
        norm = final_norm(self.decoder)
        weight = next(norm.parameters(), self.embedding.weight)
        return norm(stream.to(weight.device)).to(self.device)

    # ── cached steps over slots ───────────────────────────────────────────────────────────────────

    def open(self, slot: int) -> None:
        """Start an empty sequence in a slot."""
        self._tokens[slot] = []

    def length(self, slot: int) -> int:
        """Tokens in a slot."""
        return len(self._tokens[slot])

    def rollback(self, slot: int, length: int) -> None:
        """Forget a slot's tokens from position `length` on."""
        held = self.length(slot)
        assert 0 <= length <= held, f"slot {slot} holds {held} tokens, not {length}"
        del self._tokens[slot][length:]

    def free(self, slot: int) -> None:
        del self._tokens[slot]

    def wipe(self, slot: int, length: int) -> None:
        """Roll back, and zero the keys and values of what is forgotten: NaN among them would reach later
        passes through every mask."""
        self.rollback(slot, length)
        self._cache.wipe(slot, length)

    @property
    def _watched(self) -> bool:
        """Whether hooks on the decoder, such as those of its shards, expect its module to be called."""
        return bool(self.decoder._forward_hooks or self.decoder._forward_pre_hooks)

    def release(self) -> None:
        """Give back the memory of all slots, none of which may be in use."""
        for store in self._cache.stores:
            store.release()
        self._tokens.clear()
        self._captured.clear()

    @torch.inference_mode()
    def step(self, slots: Ints, tokens: Ragged, layers: Ints = ()) -> StepOutput:
        """Append each row's new tokens (any number, not the same) to its slot, in one forward pass.

        The outputs are inference tensors, which are cheaper because nothing is recorded; train on those of
        `read`. Raises TargetError when `read` does.
        """
        output = (self._step_cached if self.cached else self._step_again)(slots, tokens, layers)
        for slot, new in zip(slots, tokens, strict=True):
            self._tokens[slot].extend(new)
        return output

    def _step_cached(self, slots: Ints, tokens: Ragged, layers: Ints) -> StepOutput:
        """The new tokens alone, over the keys and values of the slots."""
        rows = Rows(tuple(slots), tuple(self.length(s) for s in slots), max(map(len, tokens)))
        self._check_length(max(s + len(new) for s, new in zip(rows.starts, tokens, strict=True)))
        if not self._watched and self._lean is not None:
            self._check_layers(layers)
            return StepOutput(*self._lean.step(rows.slots, rows.starts, tokens, layers))
        self._hook(tuple(layers))
        positions = rows.positions(self.device)
        if self._steady_length is not None:
            # Padding may lie past the end, where one position would turn the frequencies of all.
            positions = positions.clamp(max=self._steady_length - 1)
        self._cache.step(rows)
        output = self.decoder(
            input_ids=_padded(tokens).to(self.device),
            position_ids=positions,
            attention_mask=self._mask(rows),
            past_key_values=self._cache,
            use_cache=True,
        )
        return self._output(output)

    @cached_property
    def _lean(self) -> LeanDecoder | None:
        """The decoder for lean steps, compared with the model once; None if it takes the general path."""
        self._hook(())
        return self._fused if self._fused is not None and self._fused.reproduces() else None

    def _step_again(self, slots: Ints, tokens: Ragged, layers: Ints) -> StepOutput:
        """One pass over everything in the slots, for models whose state cannot be rolled back."""
        whole = [[*self._tokens[s], *new] for s, new in zip(slots, tokens, strict=True)]
        output = self.read(_padded(whole), layers)
        width = max(map(len, tokens))
        # Row r's new tokens are its last ones; past them, its very last stands for padding.
        ends = torch.tensor([[len(w)] for w in whole], device=self.device)
        counts = torch.tensor([[len(new)] for new in tokens], device=self.device)
        new = torch.minimum(ends - counts + torch.arange(width, device=self.device), ends - 1)
        rows = torch.arange(len(whole), device=self.device)[:, None]
        features = None if output.features is None else output.features[rows, new]
        return StepOutput(output.last_hidden[rows, new], features)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] last hidden states -> [..., V]."""
        return self.head.logits(hidden)

    @torch.no_grad()
    def transformers_generate(
        self,
        input_ids: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        stops: Sequence[int],
        **assistance: int,
    ) -> list[int]:
        """New tokens by transformers' own `generate`: the baseline that users already have.

        assistance: its settings for speculation, such as `prompt_lookup_num_tokens`; plain without any.

        Greedy at temperature 0; above it, sampling without top-k or top-p from torch's global generator. What
        else the model's generation config asks for (penalties, beams, stop strings, …) is left out: plain
        decoding does not do it, and both must follow the same law.
        """
        ids = torch.tensor([list(input_ids)], device=self.device)
        watch = _WatchedLogits()
        self._hook(())
        chosen = GenerationConfig(
            max_new_tokens=self.room(len(input_ids), max_new_tokens),
            do_sample=temperature > 0,
            temperature=temperature if temperature > 0 else None,
            top_k=0 if temperature > 0 else None,
            top_p=1.0 if temperature > 0 else None,
            eos_token_id=list(stops) or None,
            pad_token_id=0,
            **assistance,
        )
        # `generate` fills what its config leaves open from the model's own one.
        own, self.model.generation_config = self.model.generation_config, GenerationConfig()
        mask = torch.ones_like(ids)
        try:
            output = self.model.generate(
                ids, attention_mask=mask, generation_config=chosen, logits_processor=[watch]
            )
        finally:
            self.model.generation_config = own
        if watch.broken:
            raise NonFiniteError(self.spec.name, "its logits")
        return [int(t) for t in output[0, ids.shape[1] :]]

    def _mask(self, rows: Rows) -> Tensor | dict[str, Tensor] | None:
        """None where the model's own mask is right (one row); ours where rows are ragged or partly cached."""
        if len(rows.slots) == 1 and (rows.width == 1 or rows.starts[0] == 0):
            return None

        def mask(window: int | None) -> Tensor:
            seen = causal_rows_mask(rows, self.device, window)
            if self.model.config._attn_implementation != "eager":
                return seen
            # Eager attention adds its mask to the scores.
            zeros = torch.zeros(seen.shape, dtype=self.dtype, device=seen.device)
            return zeros.masked_fill(~seen, torch.finfo(self.dtype).min)

        kinds = getattr(self._config, "layer_types", None)
        window = getattr(self._config, "sliding_window", None)
        if kinds is None or "sliding_attention" not in kinds:
            return mask(None if kinds else window)
        return {"full_attention": mask(None), "sliding_attention": mask(window)}

    def _check_length(self, length: int) -> None:
        if self._steady_length is not None and length > self._steady_length:
            raise TargetError(
                f"a sequence of {length} tokens is too long for {self.spec.name}: past {self._steady_length} "
                "its rotary frequencies change with the length, also those of keys that are already stored",
                next_step=f"keep prompts and answers within {self._steady_length} tokens (data.max_length)",
            )

    # ── hooks ─────────────────────────────────────────────────────────────────────────────────────

    def _hook(self, layers: tuple[int, ...]) -> None:
        """Capture the outputs of `layers` (-1: the embedding) from the next forward pass on."""
        self._captured.clear()
        if layers == self._hooked:
            return
        self._check_layers(layers)
        for hook in self._hooks:
            hook.remove()
        self._hooks = [self._capture(i) for i in layers]
        self._hooked = layers

    def _check_layers(self, layers: Ints) -> None:
        if any(not -1 <= i < self.spec.num_layers - 1 for i in layers):
            raise TargetError(
                f"feature layers {list(layers)} do not fit {self.spec.name}, "
                f"which has {self.spec.num_layers} layers",
                next_step=f"use ids from -1 (the embedding) to {self.spec.num_layers - 2}; "
                "the last layer's output is never a feature",
            )

    def _capture(self, layer: int) -> Any:
        """Keep a layer's output on every pass. The embedding is what the first layer reads: some families
        scale it after the embedding module."""

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            self._captured[layer] = output[0] if isinstance(output, tuple) else output

        def before(module: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
            self._captured[layer] = inputs[0] if inputs else named["hidden_states"]

        if layer == -1:
            return self.decoder.layers[0].register_forward_pre_hook(before, with_kwargs=True)
        return self.decoder.layers[layer].register_forward_hook(after)

    def _output(self, output: Any) -> StepOutput:
        """The outputs of a pass through the decoder, brought to one device from wherever its layers are."""
        last_hidden = output.last_hidden_state.to(self.device)
        if not self._hooked:
            return StepOutput(last_hidden, None)
        parts = [self._captured[i].to(self.device) for i in self._hooked]
        if any(p.shape != last_hidden.shape for p in parts):
            raise TargetError(
                f"{self.spec.name}: between its layers a {self.spec.model_type!r} model carries "
                f"{list(parts[0].shape)}, not one residual stream of {list(last_hidden.shape)}, so there are "
                "no features to draft from",
                next_step="use a target of another family (docs/targets.md lists those that are tested)",
            )
        return StepOutput(last_hidden, torch.cat(parts, dim=-1))


class _WatchedLogits(LogitsProcessor):
    """Notes whether `generate` met logits without a finite maximum, and has it choose from zeros instead:
    sampling from NaN is an error of its own, which ends a GPU's process."""

    broken: Tensor | bool = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        bad = ~scores.amax(-1, keepdim=True).isfinite()
        self.broken = bad.any() | self.broken
        return scores.masked_fill(bad, 0.0)


def _padded(rows: Ragged) -> Tensor:
    """[R, longest] token ids; a row's last token fills its end."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows])
