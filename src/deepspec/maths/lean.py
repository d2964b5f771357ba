"""Decoder layers near their matrix products: few operations, real tokens only.

On small batches, layers made of modules are dispatcher work: module calls, norms in six operations, an index
for every layer. Here each layer has four matrix products, indices are made once for a step, and the new
tokens of all rows are packed without padding. Matrices are the modules' own: the fused ones become the
storage that these look into. Norms and biases may be copies, so weights must not change.

R rows, T new tokens of all rows, Q new tokens of the longest, K keys of the longest row, H query heads,
G key/value heads, D head dim, d hidden width, I MLP width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepspec.maths.fused import gated, normed, turned
from deepspec.maths.host import sent
from deepspec.maths.slots import Ragged, Rows, SlotStore, causal_rows_mask

ROTARY_ROOM = 1024
"""Positions whose rotary cosines and sines are made at once."""
Sees = Literal["before", "all", "nothing"]
"""Which of its row's keys a new token reads: up to its own, those of all new tokens too, or none, since the
step only stores keys and values."""


class Norm:
    """x [..., n] over its root mean square, times `weight` [..., n]. On the CPU torch's own takes as long as
    eight operations; here four do it, two of them on one number per vector: x·w·√n / √(|x|² + n·eps)."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight, self.eps, self.split = weight, eps, False
        if weight.device.type == "cpu" and weight.dtype == torch.float32:
            size, self.split = weight.shape[-1], True
            self.weight, self.least = weight * math.sqrt(size), torch.tensor(math.sqrt(size * eps))

    def __call__(self, x: Tensor) -> Tensor:
        if not self.split:
            return normed(x, self.weight, self.eps)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * self.weight).div_(torch.hypot(length, self.least))


@dataclass(eq=False)
class LeanLayer:
    """One layer's weights, [in, out] each as products read them, and its keys and values."""

    norm: Norm
    qkv: Tensor
    qkv_bias: Tensor | None
    qk_norm: Norm | None
    k_norm: Norm | None
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Norm
    gate_up: Tensor
    down: Tensor
    store: SlotStore


@dataclass(eq=False)
class Step:
    """Where a step's tokens are. ids: [T], empty if they were not given. turn: cos and sin [T, 1, D]. here,
    flat [T*G]: as `SlotStore.extend` takes them. mask: [R, 1, Q*H/G or 1, K] to be added to the scores, None
    if every query sees all keys, or `causal` rules. padding, packing: [R*Q] and [T] indices between packed
    and padded tokens; None if no row is padded."""

    rows: Rows
    ids: Tensor
    turn: tuple[Tensor, Tensor]
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


@dataclass(eq=False)
class LeanLayers:
    """Layers of one shape over slots, whose stores were always given the same slots in the same order.
    turns: positions [N] -> cos and sin [N, D], as `fused.turned` takes them."""

    layers: Sequence[LeanLayer]
    norm: Norm
    """After the last of them."""
    heads: int
    kv_heads: int
    dim: int
    scale: float
    activation: Callable[[Tensor], Tensor]
    turns: Callable[[Tensor], tuple[Tensor, Tensor]]
    turn: tuple[Tensor, Tensor] | None = None
    """cos and sin by position, as far as they were made."""

    def through(self, layer: LeanLayer, hidden: Tensor, step: Step) -> Tensor:
        """[T, d] hidden states after a layer, whose keys and values are stored."""
        return self.finish(layer, hidden, self.mix(layer, layer.norm(hidden), step))

    def mix(self, layer: LeanLayer, x: Tensor, step: Step) -> Tensor:
        """[T, H*D] mixed values of normed inputs [T, in], whose keys and values are stored."""
        heads, kv_heads, dim = self.heads, self.kv_heads, self.dim
        queries, keys, values = self._heads(layer, x, step.turn)
        keys, values = layer.store.extend(keys, values, step.flat, step.here, step.rows.end)
        rows, width = len(step.rows.slots), step.rows.width
        # The query heads that share a key become more queries of it: keys are never repeated.
        if width == 1:
            queries = queries.reshape(rows, kv_heads, -1, dim)
            mixed = F.scaled_dot_product_attention(queries, keys, values, step.mask, scale=self.scale)
            return mixed.reshape(rows, heads * dim)
        queries = step.padded(queries)
        if step.causal:
            mixed = self._causal(queries.transpose(1, 2), keys, values)
        else:
            queries = queries.view(rows, width, kv_heads, -1, dim).permute(0, 2, 3, 1, 4)
            queries = queries.reshape(rows, kv_heads, -1, dim)
            mixed = F.scaled_dot_product_attention(queries, keys, values, step.mask, scale=self.scale)
            mixed = mixed.view(rows, kv_heads, -1, width, dim).permute(0, 3, 1, 2, 4)
        return step.packed(mixed.reshape(rows, width, heads * dim))

    def whole(self, layer: LeanLayer, hidden: Tensor, rows: int, turn: tuple[Tensor, Tensor]) -> Tensor:
        """[T, d] after a layer, of `rows` rows that are read from their start to their end: no key is kept.
        turn: cos and sin [T, 1, D]."""
        heads = self._heads(layer, layer.norm(hidden), turn)
        queries, keys, values = (x.unflatten(0, (rows, -1)).transpose(1, 2) for x in heads)
        mixed = self._causal(queries, keys, values)
        return self.finish(layer, hidden, mixed.flatten(0, 1).flatten(1))

    def _causal(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Mixed values [R, Q, H, D] of queries [R, H, Q, D] over the keys [R, G, Q, D] up to their own."""
        return F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=self.scale, enable_gqa=self.heads > self.kv_heads
        ).transpose(1, 2)

    def finish(self, layer: LeanLayer, stream: Tensor, mixed: Tensor) -> Tensor:
        """[T, d] the residual stream [T, d] after the attention's mixed values and the MLP."""
        stream = stream if layer.out_bias is None else stream + layer.out_bias
        hidden = torch.addmm(stream, mixed, layer.out)
        both = torch.mm(layer.mlp_norm(hidden), layer.gate_up)
        inner = len(layer.down)
        return torch.addmm(hidden, gated(both[:, :inner], both[:, inner:], self.activation), layer.down)

    def remember(self, layer: LeanLayer, x: Tensor, step: Step) -> None:
        """Store the keys and values of inputs [T, in], which ask nothing."""
        start, bias, split = self.heads * self.dim, layer.qkv_bias, self.kv_heads
        x = _product(x, layer.qkv[:, start:], bias if bias is None else bias[start:])
        x = x.view(-1, 2 * split, self.dim)
        keys = x[:, :split]
        keys = turned(keys if layer.k_norm is None else layer.k_norm(keys), *step.turn)
        layer.store.extend(keys, x[:, split:], step.flat, step.here, step.rows.end)

    def plan(self, rows: Rows, tokens: Ragged | None, sees: Sees = "before") -> Step:
        """Everything that all layers need to know of a step, sent to the device in one piece. tokens: of each
        row; None if they are not known on the host, of which each row then has `rows.width`."""
        like, heads = self.layers[0].qkv, (self.kv_heads, self.dim)
        for layer in self.layers:
            here = layer.store.reserve(rows, like, heads, heads)
        room, width = self.layers[0].store.capacity, rows.width
        counts = [width] * len(rows.slots) if tokens is None else [len(new) for new in tokens]
        ids = [token for new in tokens or () for token in new]
        spans = list(zip(rows.starts, counts, strict=True))
        positions = [p for start, count in spans for p in range(start, start + count)]
        first_heads = [(here.start + r) * self.kv_heads * room for r in range(len(spans))]
        places = [f + p for f, (s, n) in zip(first_heads, spans, strict=True) for p in range(s, s + n)]
        known, total, ragged = [*ids, *positions, *places], len(positions), min(counts) < width
        if ragged:
            offsets = [sum(counts[:r]) for r in range(len(counts))]
            known += [o + min(q, n - 1) for o, n in zip(offsets, counts, strict=True) for q in range(width)]
            known += [r * width + q for r, n in enumerate(counts) for q in range(n)]
        there = sent(torch.tensor(known), like.device)
        parts = there.split([len(ids), total, total, *([len(counts) * width, total] if ragged else [])])
        padding, packing = parts[3:] if ragged else (None, None)
        flat = (parts[2][:, None] + room * torch.arange(self.kv_heads, device=there.device)).flatten()
        causal = sees == "before" and len(counts) == 1 and rows.starts[0] == 0 and width > 1
        alike = len(set(rows.starts)) == 1 and (sees == "all" or width == 1)
        mask = None if causal or alike or sees == "nothing" else self._mask(rows, sees)
        cos, sin = self.rotary(max(start + count for start, count in spans))
        turn = cos.index_select(0, parts[1]), sin.index_select(0, parts[1])
        return Step(rows, parts[0], turn, here, flat, mask, causal, padding, packing)

    def _heads(
        self, layer: LeanLayer, x: Tensor, turn: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, D], keys and values [T, G, D] of normed inputs [T, in]. turn: of their positions."""
        split = self.heads + self.kv_heads
        x = _product(x, layer.qkv, layer.qkv_bias).view(-1, split + self.kv_heads, self.dim)
        qk = x[:, :split]
        qk = turned(qk if layer.qk_norm is None else layer.qk_norm(qk), *turn)
        return qk[:, : self.heads], qk[:, self.heads :], x[:, split:]

    def _mask(self, rows: Rows, sees: Sees) -> Tensor:
        """0 where token i of a row sees a key, -inf elsewhere: [R, 1, Q*H/G, K], or [R, 1, 1, K] if all of a
        row's see the same."""
        like, repeated = self.layers[0].qkv, self.heads // self.kv_heads
        seen = causal_rows_mask(rows, like.device)
        if sees == "all":
            seen, repeated = seen[:, :, -1:], 1
        mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
        return mask.masked_fill_(~seen, -math.inf).repeat(1, 1, repeated, 1)

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [at least `length`, 1, D] by position."""
        if self.turn is None or length > len(self.turn[0]):
            room = -(-length // ROTARY_ROOM) * ROTARY_ROOM
            cos, sin = self.turns(torch.arange(room, device=self.layers[0].qkv.device))
            self.turn = cos[:, None].contiguous(), sin[:, None].contiguous()
        return self.turn


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in] times weight [in, out], plus bias [out] if there is one."""
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def _fused(*linears: nn.Linear) -> Tensor:
    """The weights of several projections as one [in, sum of outs], which the modules share from now on. On
    the CPU a row of it lies together: products with few tokens take 0.7 to 0.9 of the time."""
    whole = torch.cat([linear.weight.data for linear in linears]).t()
    if whole.device.type == "cpu" and whole.dtype == torch.float32:
        whole = whole.contiguous()
    for linear, part in zip(linears, whole.split([m.out_features for m in linears], dim=1), strict=True):
        linear.weight.data = part.t()
    return whole


def lean_layer(attention: Any, mlp: Any, norms: Sequence[Any], eps: float, store: SlotStore) -> LeanLayer:
    """A layer of the usual modules (`q_proj`, ..., `down_proj`, perhaps `q_norm` and `k_norm`). Its matrices
    are laid out here. norms: the modules before its attention and before its MLP; eps: of all its norms."""
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    biases, qk_norm, k_norm = [p.bias for p in projections], None, None
    if hasattr(getattr(attention, "k_norm", None), "weight"):
        dim = len(attention.k_norm.weight)
        pairs = [(attention.q_norm, projections[0]), (attention.k_norm, projections[1])]
        each = [norm.weight.expand(linear.out_features // dim, dim) for norm, linear in pairs]
        qk_norm, k_norm = Norm(torch.cat(each), eps), Norm(attention.k_norm.weight, eps)
    before, between = (Norm(norm.weight, eps) for norm in norms)
    return LeanLayer(
        before,
        _fused(*projections),
        None if biases[0] is None else torch.cat(biases),
        qk_norm,
        k_norm,
        _fused(attention.o_proj),
        attention.o_proj.bias,
        between,
        _fused(mlp.gate_proj, mlp.up_proj),
        _fused(mlp.down_proj),
        store,
    )
