"""A step of dense Llama-like decoders near its matrix products, by the layers of `maths.lean`.

Matrices are the model's own, and keys and values are in the stores of the general path, so that either may
take the next step. A model is taken only if its modules fit and its numbers are reproduced.

R rows, Q new tokens of the longest, m features, d hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec import families
from deepspec.drafts.layers import ACTIVATIONS
from deepspec.maths.lean import LeanLayer, LeanLayers, Norm, lean_layer
from deepspec.maths.slots import Ints, Ragged, Rows, SlotStore

LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
CHECKED = 12
"""Tokens whose hidden states are compared with the model's own before it is taken."""


class LeanDecoder:
    """The layers of a decoder, one that `lean_decoder` took, over slots."""

    def __init__(self, decoder: Any, config: Any, embedding: Tensor, stores: Sequence[SlotStore]) -> None:
        first, eps = decoder.layers[0], decoder.norm.variance_epsilon
        dim = first.self_attn.head_dim
        self.embedding, self.decoder = embedding, decoder
        layers = [
            lean_layer(
                layer.self_attn,
                layer.mlp,
                (layer.input_layernorm, layer.post_attention_layernorm),
                eps,
                store,
            )
            for layer, store in zip(decoder.layers, stores, strict=True)
        ]
        self.stack = LeanLayers(
            layers,
            Norm(decoder.norm.weight, eps),
            heads=first.self_attn.q_proj.out_features // dim,
            kv_heads=first.self_attn.k_proj.out_features // dim,
            dim=dim,
            scale=float(first.self_attn.scaling),
            activation=ACTIVATIONS.get(config.hidden_act, first.mlp.act_fn),
            turns=self._turns,
        )

    def step(
        self, slots: Ints, starts: Ints, tokens: Ragged, layers: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """(last hidden states [R, Q, d] after the final norm, features [R, Q, m*d] of `layers`): appends each
        row's new tokens to its slot, from position `starts` on."""
        step = self.stack.plan(Rows(tuple(slots), tuple(starts), max(map(len, tokens))), tokens)
        last, features = self._run(step.ids, layers, partial(self.stack.through, step=step))
        return step.padded(last), None if features is None else step.padded(features)

    def read(self, ids: Tensor, layers: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """The same of whole rows [R, Q], right-padded, without slots."""
        rows, length = ids.shape
        cos, sin = (each[:length].repeat(rows, 1, 1) for each in self.stack.rotary(length))
        last, features = self._run(
            ids.flatten(), layers, partial(self.stack.whole, rows=rows, turn=(cos, sin))
        )
        return last.unflatten(0, ids.shape), None if features is None else features.unflatten(0, ids.shape)

    def _run(
        self, ids: Tensor, layers: Sequence[int], after: Callable[[LeanLayer, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """(last hidden states [T, d], features [T, m*d]) of token ids [T]. after: a layer's output."""
        hidden = F.embedding(ids, self.embedding)
        features = {-1: hidden} if -1 in layers else {}
        for index, layer in enumerate(self.stack.layers):
            hidden = after(layer, hidden)
            if index in layers:
                features[index] = hidden
        return self.stack.norm(hidden), torch.cat([features[i] for i in layers], -1) if layers else None

    @torch.inference_mode(False)
    @torch.no_grad()
    def reproduces(self) -> bool:
        """Whether the hidden states of a few tokens are the model's own: a family may compute with the same
        modules in another way."""
        vocabulary, depth, cut = len(self.embedding), len(self.stack.layers), CHECKED // 2
        ids = [(vocabulary // 3 + 7 * i) % vocabulary for i in range(CHECKED)]
        theirs = self.decoder(
            input_ids=torch.tensor([ids], device=self.embedding.device),
            use_cache=False,
            output_hidden_states=True,
        )
        stores = [layer.store for layer in self.stack.layers]
        for layer in self.stack.layers:
            layer.store = SlotStore()
        pieces = [self.step([0], [0], [ids[:cut]], range(-1, depth - 1))]
        pieces.append(self.step([0], [cut], [ids[cut:]], range(-1, depth - 1)))
        for layer, store in zip(self.stack.layers, stores, strict=True):
            layer.store = store
        stepped = [torch.cat(part, dim=1) for part in zip(*pieces, strict=True)]
        whole = self.read(torch.tensor([ids], device=self.embedding.device), range(-1, depth - 1))
        streams = torch.cat([h[0] for h in theirs.hidden_states[:depth]], -1).float()
        near = torch.finfo(self.embedding.dtype).eps ** 0.5
        right = theirs.last_hidden_state[0].float(), streams
        return all(
            bool((ours[0].float() - own).abs().max() <= near * own.abs().max())
            for found in (stepped, whole)
            for ours, own in zip(found, right, strict=True)
            if ours is not None
        )

    def _turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What `LeanLayers` turns by, from the model's own module."""
        cos, sin = (each[0] for each in self.decoder.rotary_emb(self.embedding[:1, None], positions[None]))
        half = sin.shape[-1] // 2
        return cos, torch.cat([-sin[:, :half], sin[:, half:]], -1)


@torch.inference_mode(False)
@torch.no_grad()
def lean_decoder(
    decoder: Any, config: Any, embedding: Tensor, stores: Sequence[SlotStore]
) -> LeanDecoder | None:
    """The decoder's layers as a `LeanDecoder` over one store each, or None if it needs the general path: its
    parts are others, its layers have a window, its weights are packed or on several devices. The modules'
    weights are laid out here, before anything is computed: another layout rounds in another way. They stay
    ordinary tensors, also under inference mode."""
    if not _fits(decoder, config, embedding):
        return None
    return LeanDecoder(decoder, config, embedding, stores)


def _fits(decoder: Any, config: Any, embedding: Tensor) -> bool:
    """Whether a decoder's modules are those of Llama, Qwen2, Qwen3, Mistral and their like."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if kinds != {"full_attention"} or (windowed and not getattr(config, "layer_types", None)):
        return False
    rope = getattr(config, "rope_parameters", None) or {}
    if not hasattr(decoder, "rotary_emb") or rope.get("rope_type") in families.LENGTH_DEPENDENT_ROPE:
        return False
    if "llama_4_scaling_beta" in rope:  # a factor on queries, 1 at the positions that are compared
        return False
    if not hasattr(getattr(decoder, "norm", None), "variance_epsilon"):
        return False
    if any(type(p.data) is not Tensor or p.device != embedding.device for p in decoder.parameters()):
        return False
    return all(_layer_fits(layer, decoder.norm.variance_epsilon) for layer in decoder.layers)


def _layer_fits(layer: Any, eps: float) -> bool:
    if {name for name, _ in layer.named_children()} != LAYER_PARTS:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    inside = {name for name, _ in attention.named_children()}
    if inside - HEAD_NORMS != ATTENTION_PARTS or len(inside & HEAD_NORMS) == 1:
        return False
    if {name for name, _ in mlp.named_children()} != MLP_PARTS:
        return False
    inner = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    linears = [*(getattr(attention, name) for name in ATTENTION_PARTS), *inner]
    if any(type(linear) is not nn.Linear for linear in linears) or any(m.bias is not None for m in inner):
        return False
    if len({getattr(attention, name).bias is None for name in ("q_proj", "k_proj", "v_proj")}) != 1:
        return False
    if len({linear.weight.dtype for linear in linears}) != 1:
        return False
    dim, norms = attention.head_dim, [layer.input_layernorm, layer.post_attention_layernorm]
    if inside & HEAD_NORMS:
        norms += [attention.q_norm, attention.k_norm]
        if any(norm.weight.shape != (dim,) for norm in norms[2:]):
            return False
    return all(getattr(norm, "variance_epsilon", None) == eps for norm in norms) and dim % 2 == 0
