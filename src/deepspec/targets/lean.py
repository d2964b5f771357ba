"""A step of dense Llama-like decoders near its matrix products: few operations, real tokens only.

On small batches a step of the general path is dispatcher work: module calls, norms in six operations, an
index for every layer. Here each layer has four matrix products, indices are made once for a step, and the new
tokens of all rows are packed without padding. Matrices are the model's own: the fused ones become the storage
that its modules look into, and keys and values are in the stores of the general path, so that either may
take the next step. Norms and biases are copies, so a target's weights must not change. A model is taken only
if its modules fit and its numbers are reproduced.

R rows, T new tokens of all rows, Q new tokens of the longest, K keys of the longest row, H query heads,
G key/value heads, D head dim, d hidden width, I MLP width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec import families
from deepspec.drafts.layers import ACTIVATIONS
from deepspec.maths.slots import Ints, Ragged, Rows, SlotStore, causal_rows_mask

LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}
MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
CHECKED = 12
"""Tokens whose hidden states are compared with the model's own before it is taken."""
ROTARY_ROOM = 1024
"""Positions whose rotary cosines and sines are made at once."""


class _Norm:
    """x [..., n] over its root mean square, times `weight` [..., n]. On the CPU torch's own takes as long as
    eight operations; here four do it, two of them on one number per vector: x·w·√n / √(|x|² + n·eps)."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps, self.split = weight, eps, False
        if weight.device.type == "cpu" and weight.dtype == torch.float32:
            size, self.split = weight.shape[-1], True
            self.weight, self.least = weight * math.sqrt(size), torch.tensor(math.sqrt(size * eps))

    def __call__(self, x: Tensor) -> Tensor:
        if not self.split:
            return F.rms_norm(x, x.shape[-1:], None, self.eps) * self.weight
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * self.weight).div_(torch.hypot(length, self.least))


@dataclass(eq=False)
class _Layer:
    """One layer's weights, [in, out] each as products read them, and its keys and values."""

    norm: _Norm
    qkv: Tensor
    qkv_bias: Tensor | None
    qk_norm: _Norm | None
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: _Norm
    gate_up: Tensor
    down: Tensor
    store: SlotStore


@dataclass(eq=False)
class _Step:
    """Where a step's tokens are. ids, positions: [T]. here, flat [T*G]: as `SlotStore.extend` takes them.
    mask: [R, 1, Q*H/G, K] to be added to the scores, None if every query sees all keys, or `causal` rules.
    padding, packing: [R*Q] and [T] indices between packed and padded tokens; None if no row is padded."""

    rows: Rows
    ids: Tensor
    positions: Tensor
    here: slice
    flat: Tensor
    mask: Tensor | None
    causal: bool
    padding: Tensor | None
    packing: Tensor | None

    def padded(self, x: Tensor) -> Tensor:
        """[T, ...] packed tokens -> [R, Q, ...]; a row's last token fills its end."""
        x = x if self.padding is None else x.index_select(0, self.padding)
        return x.view(len(self.rows.slots), self.rows.width, *x.shape[1:])

    def packed(self, x: Tensor) -> Tensor:
        """[R, Q, ...] -> [T, ...]."""
        x = x.flatten(0, 1)
        return x if self.packing is None else x.index_select(0, self.packing)


class LeanDecoder:
    """The layers of a decoder, one that `lean_decoder` took, over slots."""

    def __init__(self, decoder: Any, config: Any, embedding: Tensor, stores: Sequence[SlotStore]) -> None:
        attention = decoder.layers[0].self_attn
        self.dim = attention.head_dim
        self.heads = attention.q_proj.out_features // self.dim
        self.kv_heads = attention.k_proj.out_features // self.dim
        self.scale = float(attention.scaling)
        self.embedding, self.decoder = embedding, decoder
        self.activation = ACTIVATIONS.get(config.hidden_act, decoder.layers[0].mlp.act_fn)
        self.eps = decoder.norm.variance_epsilon
        self.norm = _Norm(decoder.norm.weight, self.eps)
        self.layers = [self._layer(layer, store) for layer, store in zip(decoder.layers, stores, strict=True)]
        self.turn = embedding.new_zeros(0, 1, self.dim), embedding.new_zeros(0, 1, self.dim)

    def _layer(self, layer: Any, store: SlotStore) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        biases = [p.bias for p in projections]
        norms = None
        if hasattr(attention, "q_norm"):
            heads = [(attention.q_norm, self.heads), (attention.k_norm, self.kv_heads)]
            norms = _Norm(torch.cat([n.weight.expand(count, self.dim) for n, count in heads]), self.eps)
        return _Layer(
            _Norm(layer.input_layernorm.weight, self.eps),
            _fused(*projections),
            None if biases[0] is None else torch.cat(biases),
            norms,
            _fused(attention.o_proj),
            attention.o_proj.bias,
            _Norm(layer.post_attention_layernorm.weight, self.eps),
            _fused(mlp.gate_proj, mlp.up_proj),
            _fused(mlp.down_proj),
            store,
        )

    def step(
        self, slots: Ints, starts: Ints, tokens: Ragged, layers: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """(last hidden states [R, Q, d] after the final norm, features [R, Q, m*d] of `layers`): appends each
        row's new tokens to its slot, from position `starts` on."""
        step = self._plan(Rows(tuple(slots), tuple(starts), max(map(len, tokens))), tokens)
        cos, sin = self._rotary(max(s + len(new) for s, new in zip(starts, tokens, strict=True)))
        turn = cos.index_select(0, step.positions), sin.index_select(0, step.positions)
        hidden = F.embedding(step.ids, self.embedding)
        features = {-1: hidden} if -1 in layers else {}
        for index, layer in enumerate(self.layers):
            mixed = self._attend(layer, _product(layer.norm(hidden), layer.qkv, layer.qkv_bias), turn, step)
            stream = hidden if layer.out_bias is None else hidden + layer.out_bias
            hidden = torch.addmm(stream, mixed, layer.out)
            both = torch.mm(layer.mlp_norm(hidden), layer.gate_up)
            inner = len(layer.down)
            gated = self.activation(both[:, :inner]) * both[:, inner:]
            hidden = torch.addmm(hidden, gated, layer.down)
            if index in layers:
                features[index] = hidden
        last = step.padded(self.norm(hidden))
        return last, step.padded(torch.cat([features[i] for i in layers], -1)) if layers else None

    @torch.inference_mode(False)
    @torch.no_grad()
    def reproduces(self) -> bool:
        """Whether the hidden states of a few tokens are the model's own: a family may compute with the same
        modules in another way."""
        vocabulary, depth, cut = len(self.embedding), len(self.layers), CHECKED // 2
        ids = [(vocabulary // 3 + 7 * i) % vocabulary for i in range(CHECKED)]
        theirs = self.decoder(
            input_ids=torch.tensor([ids], device=self.embedding.device),
            use_cache=False,
            output_hidden_states=True,
        )
        stores = [layer.store for layer in self.layers]
        for layer in self.layers:
            layer.store = SlotStore()
        pieces = [self.step([0], [0], [ids[:cut]], range(-1, depth - 1))]
        pieces.append(self.step([0], [cut], [ids[cut:]], range(-1, depth - 1)))
        for layer, store in zip(self.layers, stores, strict=True):
            layer.store = store
        last, features = (torch.cat(part, dim=1)[0].float() for part in zip(*pieces, strict=True))
        streams = torch.cat([h[0] for h in theirs.hidden_states[:depth]], -1).float()
        near = torch.finfo(self.embedding.dtype).eps ** 0.5
        found = ((last, theirs.last_hidden_state[0].float()), (features, streams))
        return all(bool((a - b).abs().max() <= near * b.abs().max()) for a, b in found)

    def _attend(self, layer: _Layer, qkv: Tensor, turn: tuple[Tensor, Tensor], step: _Step) -> Tensor:
        """[T, H*D] mixed values of projected tokens [T, (H + 2G)*D], whose keys and values are stored."""
        heads, group, dim = self.heads, self.heads // self.kv_heads, self.dim
        split = heads + self.kv_heads
        x = qkv.view(-1, split + self.kv_heads, dim)
        qk = x[:, :split]
        if layer.qk_norm is not None:
            qk = layer.qk_norm(qk)
        cos, sin = turn
        half = dim // 2
        turned = torch.cat((qk[..., half:], qk[..., :half]), -1)
        qk = torch.addcmul(qk * cos, turned, sin)
        keys, values = layer.store.extend(qk[:, heads:], x[:, split:], step.flat, step.here, step.rows.end)
        rows, width = len(step.rows.slots), step.rows.width
        queries = step.padded(qk[:, :heads])
        if step.causal:
            mixed = F.scaled_dot_product_attention(
                queries.transpose(1, 2), keys, values, is_causal=True, scale=self.scale, enable_gqa=group > 1
            ).transpose(1, 2)
        else:
            # The query heads that share a key become more queries of it: keys are never repeated.
            if width > 1:
                queries = queries.view(rows, width, self.kv_heads, group, dim).permute(0, 2, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(
                queries.reshape(rows, self.kv_heads, group * width, dim),
                keys,
                values,
                attn_mask=step.mask,
                scale=self.scale,
            )
            if width > 1:
                mixed = mixed.view(rows, self.kv_heads, group, width, dim).permute(0, 3, 1, 2, 4)
        return step.packed(mixed.reshape(rows, width, heads * dim))

    def _plan(self, rows: Rows, tokens: Ragged) -> _Step:
        """Everything that all layers need to know of a step, sent to the device in one piece."""
        counts, width, heads = [len(new) for new in tokens], rows.width, (self.kv_heads, self.dim)
        # All stores were given the same slots in the same order, so tokens have the same places in each.
        for layer in self.layers:
            here = layer.store.reserve(rows, self.embedding, heads, heads)
        room = self.layers[0].store.capacity
        ids = [token for new in tokens for token in new]
        spans = list(zip(rows.starts, counts, strict=True))
        positions = [p for start, count in spans for p in range(start, start + count)]
        first_heads = [(here.start + r) * self.kv_heads * room for r in range(len(spans))]
        places = [f + p for f, (s, n) in zip(first_heads, spans, strict=True) for p in range(s, s + n)]
        known, total, ragged = [*ids, *positions, *places], len(ids), min(counts) < width
        if ragged:
            offsets = [sum(counts[:r]) for r in range(len(counts))]
            known += [o + min(q, n - 1) for o, n in zip(offsets, counts, strict=True) for q in range(width)]
            known += [r * width + q for r, n in enumerate(counts) for q in range(n)]
        sent = torch.tensor(known).to(self.embedding.device, non_blocking=True)
        parts = sent.split([total, total, total, *([len(counts) * width, total] if ragged else [])])
        causal = len(counts) == 1 and rows.starts[0] == 0 and width > 1
        alone = width == 1 and len(set(rows.starts)) == 1
        mask = None if causal or alone else self._mask(rows)
        padding, packing = parts[3:] if ragged else (None, None)
        flat = (parts[2][:, None] + room * torch.arange(self.kv_heads, device=sent.device)).flatten()
        return _Step(rows, parts[0], parts[1], here, flat, mask, causal, padding, packing)

    def _mask(self, rows: Rows) -> Tensor:
        """[R, 1, Q*H/G, K]: 0 where token i of a row sees a key, -inf elsewhere."""
        seen = causal_rows_mask(rows, self.embedding.device)
        mask = torch.zeros(seen.shape, dtype=self.embedding.dtype, device=seen.device)
        return mask.masked_fill_(~seen, -math.inf).repeat(1, 1, self.heads // self.kv_heads, 1)

    def _rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [at least `length`, 1, D] by position, from the model's own module. The sine's first
        half is negative, so that turning is x * cos + roll(x, D/2) * sin."""
        if length > len(self.turn[0]):
            room = -(-length // ROTARY_ROOM) * ROTARY_ROOM
            positions = torch.arange(room, device=self.embedding.device)[None]
            cos, sin = self.decoder.rotary_emb(self.embedding[:1, None], positions)
            half = self.dim // 2
            signed = torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)
            self.turn = cos[0][:, None].contiguous(), signed[:, None].contiguous()
        return self.turn


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def _fused(*linears: nn.Linear) -> Tensor:
    """The weights of several projections as one [in, sum of outs], which the modules share from now on. On
    the CPU a row of it lies together: products with few tokens take 0.7 to 0.9 of the time."""
    fused = torch.cat([linear.weight.data for linear in linears]).t()
    if fused.device.type == "cpu" and fused.dtype == torch.float32:
        fused = fused.contiguous()
    for linear, part in zip(linears, fused.split([m.out_features for m in linears], dim=1), strict=True):
        linear.weight.data = part.t()
    return fused


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
